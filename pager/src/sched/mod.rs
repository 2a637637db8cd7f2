//! On which CPU and with which priority a thread of the pager runs.
//!
//! | module | content |
//! |---|---|
//! | `placement` | decides on which CPU a demand thread runs |
//! | `priority` | lowers the priority of a demand thread that shares the CPU of the faulting thread |
//! | `watchdog`, `watchdog_thread` | raises that priority when a fault waits too long |
//! | `avoid_demand_cpus` | keeps background threads off the CPUs of demand threads |
//! | `give_way` | yields of a CPU, which stop where many threads wait for one |
//! | `run_delay` | how long a thread has waited for a CPU |
//! | `cpus`, `task` | sets of CPUs; the content of `/proc` about a thread |

pub(crate) mod avoid_demand_cpus;
pub(crate) mod cpus;
pub(crate) mod give_way;
pub(crate) mod placement;
pub(crate) mod priority;
pub(crate) mod run_delay;
pub(crate) mod task;
pub(crate) mod watchdog;
pub(crate) mod watchdog_thread;

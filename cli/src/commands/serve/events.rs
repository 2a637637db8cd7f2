//! The lines on stderr about the events of a server.

use pager::serve::{Consequence, ServeEvent};
use snapvm::with_causes;

use crate::foreign_text::one_line;
use crate::size;

/// The message of an event. With --quiet only failures have one.
pub(super) fn message(file: &str, event: &ServeEvent<'_>, quiet: bool) -> Option<String> {
    Some(match event {
        ServeEvent::Failed { pid, failure } => {
            format!("snap: {file}, for {}: {}\n", process(*pid), causes(failure))
        }
        ServeEvent::Refused { pid, error, consequence } => {
            let client = pid.map_or("a client".into(), process);
            let then = match consequence {
                Consequence::Poisoned => "; its missing pages fail when it touches them",
                Consequence::Killed => "; it was killed",
                Consequence::NotKilled => {
                    "; it cannot be killed by this server, and may wait forever: end it"
                }
                _ => "",
            };
            format!("snap: {client} is not served: {}{then}\n", causes(error))
        }
        ServeEvent::NotKept { pid, error } => {
            format!(
                "snap: {} would not survive the end of this server: {}\n",
                process(*pid),
                causes(error)
            )
        }
        ServeEvent::Accept { error } => format!("snap: cannot accept: {error}\n"),
        _ if quiet => return None,
        ServeEvent::Served { pid, memory_bytes } => {
            format!("{}: {} are served\n", process(*pid), size::human(*memory_bytes))
        }
        ServeEvent::TakenOver { pid, memory_bytes } => {
            format!(
                "{}: {} are served, taken over from a dead server\n",
                process(*pid),
                size::human(*memory_bytes)
            )
        }
        ServeEvent::Ended { pid, stats } => {
            let loaded = stats.pages.total - stats.pages.missing;
            let (faults, total) = (stats.faults, stats.pages.total);
            let process = process(*pid);
            format!("{process}: ended after {faults} faults, {loaded} of {total} pages\n")
        }
        _ => return None,
    })
}

/// Parts of these messages are the client's words.
fn causes(error: &dyn std::error::Error) -> String {
    one_line(&with_causes(error)).into_owned()
}

/// A process that is in another PID namespace has no id here.
fn process(pid: i32) -> String {
    match pid {
        0 => "a process of another PID namespace".into(),
        pid => format!("process {pid}"),
    }
}

#[cfg(test)]
mod tests {
    use pager::serve::RefuseError;

    use super::*;

    #[test]
    fn the_consequence_of_a_refusal_is_reported_with_quiet_too() {
        let printed = |pid, consequence| {
            let event = ServeEvent::Refused { pid, error: &RefuseError::NoRegion, consequence };
            message("a.snap", &event, true).unwrap_or_default()
        };
        let why = "process 7 is not served: the message has no region";
        assert_eq!(printed(Some(7), Consequence::Closed), format!("snap: {why}\n"));
        assert_eq!(printed(Some(7), Consequence::Killed), format!("snap: {why}; it was killed\n"));
        let poisoned = "; its missing pages fail when it touches them";
        assert_eq!(printed(Some(7), Consequence::Poisoned), format!("snap: {why}{poisoned}\n"));
        let unknown = printed(Some(0), Consequence::Closed);
        assert!(unknown.contains("a process of another PID namespace is not"), "{unknown}");
        assert!(printed(None, Consequence::Closed).starts_with("snap: a client is not served"));
    }

    #[test]
    fn a_client_cannot_print_a_line_of_its_own() {
        #[derive(Debug, serde::Deserialize)]
        enum Known {}
        let message_of = serde_json::from_str::<Known>("\"x\\nsnap: all is well\"").unwrap_err();
        assert!(message_of.to_string().contains('\n'), "{message_of}");
        let error = RefuseError::Message(message_of);
        let event =
            ServeEvent::Refused { pid: None, error: &error, consequence: Consequence::Closed };
        let printed = message("a.snap", &event, true).unwrap_or_default();
        assert_eq!(printed.lines().count(), 1, "{printed}");
    }
}

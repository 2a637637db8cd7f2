// The program of the nested lane's guest: fills memory, writes a file, says READY, then checks all of it
// again and again, one line each time:
//
//     tick N ok date=SECONDS random=HEX boot=UUID cpus=ANSWERED/ONLINE
//
// or `tick N BAD WHAT`. A line that it reads on the console comes back as `heard LINE`.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { WORK_BYTES = 16 << 20, STRIPES = 8, CPUS_MAX = 64, TICK_MS = 200 };
static const char FILE_TEXT[] = "written before the snapshot\n";

static uint64_t word_at(uint64_t index) {
    uint64_t x = index + 1;
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdUL;
    return x ^ x >> 33;
}

static void die(const char *what) {
    printf("BAD: %s: %s\n", what, strerror(errno));
    for (;;) pause();
}

static void write_file(const char *path) {
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    if (fd < 0 || write(fd, FILE_TEXT, sizeof FILE_TEXT) != sizeof FILE_TEXT || fsync(fd)) die(path);
    close(fd);
}

static int file_is_good(const char *path) {
    char text[sizeof FILE_TEXT + 1];
    int fd = open(path, O_RDONLY);
    if (fd < 0) return 0;
    // A disk's file is to come from the disk, not from memory. Others stay where they are.
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ssize_t got = read(fd, text, sizeof text);
    close(fd);
    return got == sizeof FILE_TEXT && !memcmp(text, FILE_TEXT, sizeof FILE_TEXT);
}

// One process on each CPU answers each byte with the number of the CPU that it runs on.
static int ask[CPUS_MAX][2], answer[CPUS_MAX][2], cpus;

static void start_on_cpus(void) {
    cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    for (int cpu = 0; cpu < cpus && cpu < CPUS_MAX; cpu++) {
        if (pipe(ask[cpu]) || pipe(answer[cpu])) die("pipe");
        if (fork() == 0) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(cpu, &set);
            if (sched_setaffinity(0, sizeof set, &set)) _exit(1);
            char byte;
            while (read(ask[cpu][0], &byte, 1) == 1) {
                byte = (char)sched_getcpu();
                if (write(answer[cpu][1], &byte, 1) != 1) break;
            }
            _exit(1);
        }
    }
}

static int cpus_that_answer(void) {
    int good = 0;
    for (int cpu = 0; cpu < cpus && cpu < CPUS_MAX; cpu++) {
        char byte = -1;
        if (write(ask[cpu][1], "?", 1) == 1 && read(answer[cpu][0], &byte, 1) == 1) good += byte == cpu;
    }
    return good;
}

static void hear(void) {
    char line[80];
    struct pollfd stdin_ready = {0, POLLIN, 0};
    while (poll(&stdin_ready, 1, 0) == 1) {
        ssize_t got = read(0, line, sizeof line - 1);
        if (got <= 0) return;
        line[got] = 0;
        printf("heard %s", line);
    }
}

static void read_text(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY);
    ssize_t got = fd < 0 ? -1 : read(fd, text, size - 1);
    if (got < 0) die(path);
    text[got] = 0;
    text[strcspn(text, "\n")] = 0;
    close(fd);
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct stat found;
    int disk = stat("/disk", &found) == 0;
    uint64_t words = WORK_BYTES / sizeof(uint64_t), per_stripe = words / STRIPES;
    uint64_t *work = mmap(NULL, WORK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (work == MAP_FAILED) die("mmap");
    for (uint64_t i = 0; i < words; i++) work[i] = word_at(i);
    write_file("/tmp/before");
    if (disk) write_file("/disk/before");
    start_on_cpus();
    char boot_id[64];
    printf("READY cpus=%d disk=%s\n", cpus, disk ? "yes" : "no");

    for (uint64_t tick = 1;; tick++) {
        usleep(TICK_MS * 1000);
        const char *bad = NULL;
        uint64_t first = tick % STRIPES * per_stripe;
        for (uint64_t i = first; i < first + per_stripe; i++)
            if (work[i] != word_at(i)) bad = "memory";
        if (!file_is_good("/tmp/before")) bad = "file in memory";
        if (disk && !file_is_good("/disk/before")) bad = "file on disk";
        // Also a write to the disk, and its flush.
        if (disk) write_file("/disk/each-tick");
        int answered = cpus_that_answer();
        if (answered != cpus) bad = "a CPU";
        uint64_t random;
        int fd = open("/dev/urandom", O_RDONLY);
        if (fd < 0 || read(fd, &random, sizeof random) != sizeof random) die("/dev/urandom");
        close(fd);
        read_text("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        printf("tick %lu %s%s date=%ld random=%016lx boot=%s cpus=%d/%d\n", tick, bad ? "BAD " : "ok",
               bad ? bad : "", now.tv_sec, random, boot_id, answered, cpus);
        hear();
    }
}

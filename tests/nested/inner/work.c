// The program of the nested lane's guest: fills memory, writes a file, prints READY, then checks all of it
// repeatedly, with one line each time:
//
//     tick N ok date=SECONDS random=HEX boot=UUID cpus=ANSWERED/ONLINE raw=WORD old=STATE ready=SECONDS
//
// or `tick N BAD WHAT`. It answers a line from the console with `heard LINE`.
//
// With /disk, a file system on a disk: its file is read from the disk each time, not from memory. With /dev/vdb:
// WORD is the present beginning of the disk, read around all caches, and `guest wrote this` is written behind
// it. With virtio-rng: it gives bytes. With /dev/vsock: port 1000 sends back what it gets, port 2000 of the host
// gets `from the guest` each time, and STATE is the state of a connection to port 2001 from before READY.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/vm_sockets.h>
#include <sys/mman.h>
#include <sys/socket.h>
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

static void read_text(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY);
    ssize_t got = fd < 0 ? -1 : read(fd, text, size - 1);
    if (got < 0) die(path);
    text[got] = 0;
    text[strcspn(text, "\n")] = 0;
    close(fd);
}

static int file_is_good(const char *path) {
    char text[sizeof FILE_TEXT + 1];
    int fd = open(path, O_RDONLY);
    if (fd < 0) return 0;
    ssize_t got = read(fd, text, sizeof text);
    close(fd);
    return got == sizeof FILE_TEXT && !memcmp(text, FILE_TEXT, sizeof FILE_TEXT);
}

static unsigned long disk_reads(void) {
    char text[256];
    read_text("/sys/block/vda/stat", text, sizeof text);
    return strtoul(text, NULL, 10);
}

// A file that is not cached any more: it must be read from the disk.
static const char *disk_is_good(const char *path) {
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
    if (fd < 0 || write(fd, "3", 1) != 1) die("drop_caches");
    close(fd);
    unsigned long before = disk_reads();
    if (!file_is_good(path)) return "file on disk";
    return disk_reads() == before ? "file on disk, which was not read" : NULL;
}

// The first word of a disk, past all caches; and writes behind it.
static const char *raw_disk(char *word, size_t size) {
    static char sector[512] __attribute__((aligned(512)));
    int fd = open("/dev/vdb", O_RDWR | O_DIRECT);
    if (fd < 0) return "raw disk";
    int good = pread(fd, sector, sizeof sector, 0) == sizeof sector;
    snprintf(word, size, "%.20s", sector);
    word[strcspn(word, "\n ")] = 0;
    memset(sector, 0, sizeof sector);
    strcpy(sector, "guest wrote this\n");
    good &= pwrite(fd, sector, sizeof sector, 4096) == sizeof sector;
    close(fd);
    return good ? NULL : "raw disk";
}

static int vsock_to_host(unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0) return fd;
    close(fd);
    return -1;
}

static const char *state_of(int fd) {
    char byte;
    if (fd < 0) return "none";
    ssize_t got = recv(fd, &byte, 1, MSG_DONTWAIT);
    if (got > 0) return "data";
    return got < 0 && errno == EAGAIN ? "alive" : "gone";
}

static void start_echo(void) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 1000};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8)) die("vsock");
    if (fork() != 0) return;
    for (;;) {
        char bytes[4096];
        int fd = accept(listener, NULL, NULL);
        ssize_t got;
        while ((got = read(fd, bytes, sizeof bytes)) > 0)
            if (write(fd, bytes, (size_t)got) != got) break;
        close(fd);
    }
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

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct stat found;
    int disk = stat("/disk", &found) == 0, raw = stat("/dev/vdb", &found) == 0;
    // /dev/hwrng exists without a device too; then it has no source.
    char source[64] = "none";
    if (stat("/dev/hwrng", &found) == 0) read_text("/sys/class/misc/hw_random/rng_current", source, sizeof source);
    int rng = strncmp(source, "virtio", 6) == 0, vsock = stat("/dev/vsock", &found) == 0;
    uint64_t words = WORK_BYTES / sizeof(uint64_t), per_stripe = words / STRIPES;
    uint64_t *work = mmap(NULL, WORK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (work == MAP_FAILED) die("mmap");
    for (uint64_t i = 0; i < words; i++) work[i] = word_at(i);
    write_file("/tmp/before");
    if (disk) write_file("/disk/before");
    start_on_cpus();
    if (vsock) start_echo();
    int old = vsock ? vsock_to_host(2001) : -1;
    char boot_id[64], word[32] = "none";
    printf("devices disk=%d raw=%d rng=%d vsock=%d old=%s\n", disk, raw, rng, vsock, state_of(old));
    struct timespec ready;
    clock_gettime(CLOCK_REALTIME, &ready);
    printf("READY cpus=%d\n", cpus);

    for (uint64_t tick = 1;; tick++) {
        usleep(TICK_MS * 1000);
        const char *bad = NULL;
        uint64_t first = tick % STRIPES * per_stripe;
        for (uint64_t i = first; i < first + per_stripe; i++)
            if (work[i] != word_at(i)) bad = "memory";
        if (!file_is_good("/tmp/before")) bad = "file in memory";
        if (disk && disk_is_good("/disk/before")) bad = disk_is_good("/disk/before");
        // Also a write to the disk, and its flush.
        if (disk) write_file("/disk/each-tick");
        if (raw && raw_disk(word, sizeof word)) bad = "raw disk";
        if (rng) {
            uint64_t entropy[4];
            int hwrng = open("/dev/hwrng", O_RDONLY);
            if (hwrng < 0 || read(hwrng, entropy, sizeof entropy) != sizeof entropy) bad = "hwrng";
            close(hwrng);
        }
        int to_host = vsock ? vsock_to_host(2000) : -1;
        if (to_host >= 0 && write(to_host, "from the guest\n", 15) != 15) bad = "vsock";
        close(to_host);
        int answered = cpus_that_answer();
        if (answered != cpus) bad = "a CPU";
        uint64_t random;
        int fd = open("/dev/urandom", O_RDONLY);
        if (fd < 0 || read(fd, &random, sizeof random) != sizeof random) die("/dev/urandom");
        close(fd);
        read_text("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        printf("tick %lu %s%s date=%ld random=%016lx boot=%s cpus=%d/%d raw=%s old=%s ready=%ld\n", tick,
               bad ? "BAD " : "ok", bad ? bad : "", now.tv_sec, random, boot_id, answered, cpus, word,
               state_of(old), ready.tv_sec);
        hear();
    }
}

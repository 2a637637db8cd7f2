// The host's end of a guest's vsock, for the cases:
//
//     vsock ask SOCKET PORT TEXT    connects to the guest's port, sends TEXT, prints the answer
//     vsock answer SOCKET           waits at a socket for one connection, prints its first line; stays until it ends
//
// Exits with 0 on success. It tries again while the guest does not listen yet, for SECONDS at most.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { SECONDS = 120 };

static struct sockaddr_un address_of(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    return address;
}

// A line, without what comes after it; 0 at the end.
static int read_line(int fd, char *line, size_t size) {
    size_t len = 0;
    while (len + 1 < size && read(fd, line + len, 1) == 1)
        if (line[len++] == '\n') break;
    line[len] = 0;
    return len > 0 && line[len - 1] == '\n';
}

static int ask(const char *path, const char *port, const char *text) {
    struct sockaddr_un address = address_of(path);
    char line[4096];
    for (;; usleep(100 * 1000)) {
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0) {
            dprintf(fd, "CONNECT %s\n", port);
            if (read_line(fd, line, sizeof line) && strncmp(line, "OK ", 3) == 0) {
                dprintf(fd, "%s\n", text);
                if (read_line(fd, line, sizeof line)) {
                    fputs(line, stdout);
                    return 0;
                }
            }
        }
        close(fd);
    }
}

static int answer(const char *path) {
    struct sockaddr_un address = address_of(path);
    char line[4096];
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    unlink(path);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8)) return 1;
    int fd = accept(listener, NULL, NULL);
    while (read_line(fd, line, sizeof line)) {
        fputs(line, stdout);
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv) {
    alarm(SECONDS);
    if (argc == 5 && !strcmp(argv[1], "ask")) return ask(argv[2], argv[3], argv[4]);
    if (argc == 3 && !strcmp(argv[1], "answer")) return answer(argv[2]);
    return 2;
}

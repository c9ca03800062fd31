/* A disk that fails at a chosen moment, for tests/test_crash.py: preloaded, it stands between a process and the C
 * library, and counts what changes the files below one folder: creating, writing, syncing, renaming, removing.
 *
 *   crash_arm(folder, n, DIE)    the process is gone before the n-th of them
 *   crash_arm(folder, n, TORN)   the n-th write reaches half of its bytes, then the process is gone
 *   crash_arm(folder, n, FULL)   from the n-th on nothing more fits; the n-th write still gets half of its bytes in
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, DIE, TORN, FULL };
enum { GONE = 99 }; /* exit status */

static char folder[PATH_MAX];
static long fatal, count;
static int mode = OFF;

void crash_arm(const char *path, long n, int how) {
    snprintf(folder, sizeof folder, "%s", path);
    fatal = n;
    count = 0;
    mode = how;
}

long crash_count(void) { return count; }

static int below(const char *path) {
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int of_file(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

/* 0: go on; 1: the call fails for want of room; 2: half of it is done */
static int step(int counted, int is_write, int takes_room) {
    if (mode == OFF || !counted || (mode == TORN && !is_write)) return 0;
    count++;
    if (fatal == 0 || count < fatal) return 0;
    if (mode == DIE) _exit(GONE);
    if (count == fatal && is_write) return 2;
    return mode == FULL && takes_room;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSE do { errno = ENOSPC; return -1; } while (0)

ssize_t write(int descriptor, const void *data, size_t size) {
    int what = step(mode != OFF && of_file(descriptor), 1, 1);
    if (what == 1) REFUSE;
    if (what == 2) {
        size_t half = size / 2;
        ssize_t done = half ? REAL(write)(descriptor, data, half) : 0;
        if (mode == TORN) _exit(GONE);
        if (!half) REFUSE;
        return done;
    }
    return REAL(write)(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    int what = step(mode != OFF && of_file(descriptor), 1, 1);
    if (what == 1) REFUSE;
    if (what == 2) {
        size_t half = parts[0].iov_len / 2;
        ssize_t done = half ? REAL(write)(descriptor, parts[0].iov_base, half) : 0;
        if (mode == TORN) _exit(GONE);
        if (!half) REFUSE;
        return done;
    }
    return REAL(writev)(descriptor, parts, number);
}

int fsync(int descriptor) {
    if (step(mode != OFF && of_file(descriptor), 0, 1)) REFUSE;
    return REAL(fsync)(descriptor);
}

int fdatasync(int descriptor) {
    if (step(mode != OFF && of_file(descriptor), 0, 1)) REFUSE;
    return REAL(fdatasync)(descriptor);
}

int ftruncate64(int descriptor, off_t length) {
    if (step(mode != OFF && of_file(descriptor), 0, 0)) REFUSE;
    return REAL(ftruncate64)(descriptor, length);
}

int rename(const char *from, const char *to) {
    if (step(mode != OFF && below(to), 0, 1)) REFUSE;
    return REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    if (step(mode != OFF && below(to), 0, 1)) REFUSE;
    return REAL(renameat)(from_folder, from, to_folder, to);
}

int unlink(const char *path) {
    if (step(mode != OFF && below(path), 0, 0)) REFUSE;
    return REAL(unlink)(path);
}

int unlinkat(int in, const char *path, int flags) { /* rmtree names what it removes by its open folder */
    if (step(mode != OFF && (path[0] == '/' ? below(path) : of_file(in)), 0, 0)) REFUSE;
    return REAL(unlinkat)(in, path, flags);
}

int rmdir(const char *path) {
    if (step(mode != OFF && below(path), 0, 0)) REFUSE;
    return REAL(rmdir)(path);
}

int mkdir(const char *path, mode_t rights) {
    if (step(mode != OFF && below(path), 0, 1)) REFUSE;
    return REAL(mkdir)(path, rights);
}

#define OPEN(name, ...)                                                                  \
    {                                                                                    \
        mode_t rights = 0;                                                               \
        if (flags & O_CREAT) {                                                           \
            va_list rest;                                                                \
            va_start(rest, flags);                                                       \
            rights = va_arg(rest, mode_t);                                               \
            va_end(rest);                                                                \
            if (step(mode != OFF && below(path) && access(path, F_OK), 0, 1)) REFUSE;    \
        }                                                                                \
        return REAL(name)(__VA_ARGS__, flags, rights);                                   \
    }

int open(const char *path, int flags, ...) OPEN(open, path)
int open64(const char *path, int flags, ...) OPEN(open64, path)
int openat(int in, const char *path, int flags, ...) OPEN(openat, in, path)
int openat64(int in, const char *path, int flags, ...) OPEN(openat64, in, path)

/* Stands between a program and the C library, and counts, kills at or fails changes of files below one folder.

   LD_PRELOAD=shim.so FAULTS_CONTROL=FILE program: FILE is mapped as `struct control` and shared with whoever sets it
   (kills.py), by all processes that the program forks or starts. Calls that reach the kernel without the C library
   (stdio's own, Rust's rustix) and stores to mapped files are not seen; shared writable maps are counted. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, HALF, ONCE, FULL };

struct control {
    long fault, at;                /* which fault, at which change or write, from 1 */
    long changes, writes, mapped;  /* seen so far; writes are changes too */
    char root[4096];
};

static struct control *control;

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("FAULTS_CONTROL");
    int fd = file ? open(file, O_RDWR) : -1;
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) control = mapped;
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static int below(const char *path) {
    size_t n = strlen(control->root);
    return strncmp(path, control->root, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int watched_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!control || control->fault == OFF) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int watched(int dir, const char *path) {
    char whole[2 * PATH_MAX], link[64];
    if (!control || control->fault == OFF || !path) return 0;
    if (path[0] == '/') return below(path);
    snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, whole, PATH_MAX);
    if (n < 0) return 0;
    snprintf(whole + n, sizeof whole - n, "/%s", path);
    return below(whole);
}

static void die(void) {
    kill(0, SIGKILL); /* the process group: whatever the program has started */
    for (;;) pause();
}

static void change(void) {
    long n = __sync_add_and_fetch(&control->changes, 1);
    if (control->fault == KILL && n == control->at) die();
}

static __thread int last; /* whether the process dies after this write */

/* How many bytes of a write may be written; -1: it fails. */
static ssize_t allowed(size_t size) {
    change();
    long n = __sync_add_and_fetch(&control->writes, 1);
    last = control->fault == HALF && n == control->at;
    if ((control->fault == ONCE && n == control->at) || (control->fault == FULL && n >= control->at)) {
        errno = ENOSPC;
        return -1;
    }
    return last ? size / 2 : size;
}

#define WRITE(fd, size, whole, part)   \
    if (!watched_fd(fd)) return whole; \
    ssize_t may = allowed(size);       \
    if (may < 0) return -1;            \
    if (!last) return whole;           \
    (void)!(part);                     \
    die();                             \
    return -1;

ssize_t write(int fd, const void *data, size_t size) {
    WRITE(fd, size, REAL(write)(fd, data, size), REAL(write)(fd, data, may))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    WRITE(fd, size, REAL(pwrite)(fd, data, size, at), REAL(pwrite)(fd, data, may, at))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    WRITE(fd, size, REAL(pwrite64)(fd, data, size, at), REAL(pwrite64)(fd, data, may, at))
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    size_t size = 0, first = count ? parts[0].iov_len : 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    WRITE(fd, size, REAL(writev)(fd, parts, count),
          (size_t)may > first ? REAL(writev)(fd, parts, 1) : REAL(write)(fd, parts[0].iov_base, may))
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    WRITE(out, size, REAL(sendfile)(out, in, at, size), REAL(sendfile)(out, in, at, may))
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    WRITE(out, size, REAL(sendfile64)(out, in, at, size), REAL(sendfile64)(out, in, at, may))
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    WRITE(out, size, REAL(copy_file_range)(in, from, out, to, size, flags),
          REAL(copy_file_range)(in, from, out, to, may, flags))
}

static void opening(int dir, const char *path, int flags) {
    if (!(flags & (O_CREAT | O_TRUNC)) || !watched(dir, path)) return;
    if ((flags & O_TRUNC) || faccessat(dir, path, F_OK, AT_SYMLINK_NOFOLLOW)) change();
}

#define MODE                                  \
    mode_t mode = 0;                          \
    if (flags & (O_CREAT | O_TMPFILE)) {      \
        va_list more;                         \
        va_start(more, flags);                \
        mode = va_arg(more, mode_t);          \
        va_end(more);                         \
    }

int open(const char *path, int flags, ...) {
    MODE opening(AT_FDCWD, path, flags);
    return REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE opening(AT_FDCWD, path, flags);
    return REAL(open64)(path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
    MODE opening(dir, path, flags);
    return REAL(openat)(dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...) {
    MODE opening(dir, path, flags);
    return REAL(openat64)(dir, path, flags, mode);
}
static int flags_of(const char *mode) {
    return mode[0] == 'w' ? O_CREAT | O_TRUNC : mode[0] == 'a' ? O_CREAT : 0;
}
FILE *fopen(const char *path, const char *mode) {
    opening(AT_FDCWD, path, flags_of(mode));
    return REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    opening(AT_FDCWD, path, flags_of(mode));
    return REAL(fopen64)(path, mode);
}

#define CHANGE(result, name, at, types, names) \
    result name types {                        \
        if (at) change();                      \
        return REAL(name) names;               \
    }
#define HERE(path) watched(AT_FDCWD, path)

CHANGE(int, rename, HERE(from) || HERE(to), (const char *from, const char *to), (from, to))
CHANGE(int, renameat, watched(a, from) || watched(b, to), (int a, const char *from, int b, const char *to), (a, from, b, to))
CHANGE(int, renameat2, watched(a, from) || watched(b, to), (int a, const char *from, int b, const char *to, unsigned f),
       (a, from, b, to, f))
CHANGE(int, link, HERE(to), (const char *from, const char *to), (from, to))
CHANGE(int, linkat, watched(b, to), (int a, const char *from, int b, const char *to, int f), (a, from, b, to, f))
CHANGE(int, symlink, HERE(to), (const char *from, const char *to), (from, to))
CHANGE(int, unlink, HERE(path), (const char *path), (path))
CHANGE(int, unlinkat, watched(dir, path), (int dir, const char *path, int f), (dir, path, f))
CHANGE(int, remove, HERE(path), (const char *path), (path))
CHANGE(int, rmdir, HERE(path), (const char *path), (path))
CHANGE(int, mkdir, HERE(path), (const char *path, mode_t mode), (path, mode))
CHANGE(int, mkdirat, watched(dir, path), (int dir, const char *path, mode_t mode), (dir, path, mode))
CHANGE(int, chmod, HERE(path), (const char *path, mode_t mode), (path, mode))
CHANGE(int, truncate, HERE(path), (const char *path, off_t size), (path, size))
CHANGE(int, truncate64, HERE(path), (const char *path, off64_t size), (path, size))
CHANGE(int, ftruncate, watched_fd(fd), (int fd, off_t size), (fd, size))
CHANGE(int, ftruncate64, watched_fd(fd), (int fd, off64_t size), (fd, size))
CHANGE(int, posix_fallocate, watched_fd(fd), (int fd, off_t at, off_t size), (fd, at, size))
CHANGE(int, posix_fallocate64, watched_fd(fd), (int fd, off64_t at, off64_t size), (fd, at, size))

static void mapping(int protection, int flags, int fd) {
    if (fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) && watched_fd(fd))
        __sync_add_and_fetch(&control->mapped, 1);
}
void *mmap(void *where, size_t size, int protection, int flags, int fd, off_t at) {
    mapping(protection, flags, fd);
    return REAL(mmap)(where, size, protection, flags, fd, at);
}
void *mmap64(void *where, size_t size, int protection, int flags, int fd, off64_t at) {
    mapping(protection, flags, fd);
    return REAL(mmap64)(where, size, protection, flags, fd, at);
}

/*
 * System workloads: what the time goes into is the kernel, entering and leaving it, and address spaces.
 */
#define _GNU_SOURCE
#include "work.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- syscall: the least that a system call can do ---- */

static uint64_t syscall_pass(void)
{
    uint64_t wrong = 0;
    pid_t parent = getppid();
    for (int i = 0; i < 60000; i++)
        wrong += syscall(SYS_getppid) != parent;
    return wrong;
}

/* ---- read: a page at a time from a file in memory ---- */

enum { FILE_BYTES = 1 << 20, PAGE = 4096 };
static int file;

static void read_prepare(void)
{
    static char data[FILE_BYTES];
    fill_text(data, sizeof data);
    file = memfd_create("read", MFD_CLOEXEC);
    if (file < 0 || write(file, data, sizeof data) != sizeof data)
        fail("memfd");
}

static uint64_t read_pass(void)
{
    char page[PAGE];
    uint64_t sum = CHECK_START;
    for (int i = 0; i < 20000; i++) {
        if (pread(file, page, sizeof page, (off_t)(i * 37 % (FILE_BYTES / PAGE)) * PAGE) != sizeof page)
            fail("pread");
        sum = check(sum, page + (i & 2047), 8);
    }
    return sum;
}

/* ---- faults: pages that come and go ---- */

static uint64_t faults_pass(void)
{
    enum { PAGES = 512 };
    uint64_t sum = 0;
    for (int round = 0; round < 10; round++) {
        char *pages = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED)
            fail("mmap");
        /* One at a time, whatever the host or the guest thinks of huge pages. */
        madvise(pages, PAGES * PAGE, MADV_NOHUGEPAGE);
        for (int i = 0; i < PAGES; i++) {
            sum += (uint64_t)pages[i * PAGE + 1];
            pages[i * PAGE] = (char)(i + round);
        }
        for (int i = 0; i < PAGES; i++)
            sum = sum * 3 + (uint8_t)pages[i * PAGE];
        if (munmap(pages, PAGES * PAGE) != 0)
            fail("munmap");
    }
    return sum;
}

/* ---- pipe: two processes that wake each other ---- */

static uint64_t pipe_pass(void)
{
    enum { TRIPS = 1000 };
    int there[2], back[2], status;
    if (pipe(there) != 0 || pipe(back) != 0)
        fail("pipe");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    uint32_t number;
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &number, sizeof number) == sizeof number) {
            number = number * 69069 + 1;
            if (write(back[1], &number, sizeof number) != sizeof number)
                _exit(1);
        }
        _exit(0);
    }
    number = 1;
    for (int i = 0; i < TRIPS; i++)
        if (write(there[1], &number, sizeof number) != sizeof number || read(back[0], &number, sizeof number) != sizeof number)
            fail("pipe");
    close(there[0]), close(there[1]), close(back[0]), close(back[1]);
    if (waitpid(child, &status, 0) != child || status != 0)
        fail("waitpid");
    return number;
}

/* ---- fork and exec ---- */

static uint64_t fork_pass(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 80; i++) {
        int status;
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child == 0)
            _exit(i & 127);
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status))
            fail("waitpid");
        sum = sum * 3 + (uint64_t)WEXITSTATUS(status);
    }
    return sum;
}

static uint64_t exec_pass(void)
{
    uint64_t wrong = 0;
    for (int i = 0; i < 25; i++) {
        int status;
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child == 0) {
            execl(self, self, "nothing", (char *)NULL);
            _exit(127);
        }
        if (waitpid(child, &status, 0) != child)
            fail("waitpid");
        wrong += status != 0;
    }
    if (wrong)
        fail(self);
    return wrong;
}

/* ---- lock: two threads and one mutex ---- */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t counted;

static void *count(void *unused)
{
    for (int i = 0; i < 1000000; i++) {
        pthread_mutex_lock(&mutex);
        counted++;
        pthread_mutex_unlock(&mutex);
    }
    return unused;
}

static void two_threads(void *(*what)(void *), void *first, void *second)
{
    pthread_t other;
    if (pthread_create(&other, NULL, what, second) != 0)
        fail("pthread_create");
    what(first);
    if (pthread_join(other, NULL) != 0)
        fail("pthread_join");
}

static uint64_t lock_pass(void)
{
    counted = 0;
    two_threads(count, NULL, NULL);
    return counted;
}

/* ---- threads: made and ended ---- */

static void *add_one(void *to)
{
    ++*(uint64_t *)to;
    return NULL;
}

static uint64_t threads_pass(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 500; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, add_one, &sum) != 0 || pthread_join(thread, NULL) != 0)
            fail("pthread_create");
    }
    return sum;
}

/* ---- signal: to oneself ---- */

static volatile sig_atomic_t signals;

static void on_signal(int number)
{
    signals += number == SIGUSR1;
}

static void signal_prepare(void)
{
    struct sigaction action = {.sa_handler = on_signal};
    if (sigaction(SIGUSR1, &action, NULL) != 0)
        fail("sigaction");
}

static uint64_t signal_pass(void)
{
    signals = 0;
    for (int i = 0; i < 5000; i++)
        raise(SIGUSR1);
    return (uint64_t)signals;
}

/* ---- files: made, written, renamed, looked at, deleted, in /tmp ---- */

static uint64_t files_pass(void)
{
    uint64_t sum = 0;
    char page[PAGE], name[64], new_name[80];
    memset(page, 'x', sizeof page);
    for (int i = 0; i < 300; i++) {
        struct stat about;
        snprintf(name, sizeof name, "/tmp/work-%d-%d", (int)getpid(), i);
        snprintf(new_name, sizeof new_name, "%s-new", name);
        int fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
        if (fd < 0 || write(fd, page, sizeof page) != sizeof page || close(fd) != 0)
            fail(name);
        if (rename(name, new_name) != 0 || stat(new_name, &about) != 0 || unlink(new_name) != 0)
            fail(new_name);
        sum += (uint64_t)about.st_size;
    }
    return sum;
}

const struct workload system_workloads[] = {
    {"syscall", 8, syscall_pass, NULL},
    {"read", 8, read_pass, read_prepare},
    {"faults", 8, faults_pass, NULL},
    {"pipe", 16, pipe_pass, NULL},
    {"fork", 8, fork_pass, NULL},
    {"exec", 8, exec_pass, NULL},
    {"lock", 8, lock_pass, NULL},
    {"threads", 8, threads_pass, NULL},
    {"signal", 8, signal_pass, signal_prepare},
    {"files", 8, files_pass, NULL},
    {0},
};

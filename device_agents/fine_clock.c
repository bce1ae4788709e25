/* Two ways to see what a runtime's kernels take more finely than its profiler tells, each for one library of the process
   that this file is preloaded into. Everything else in the process keeps its clock and its memory, and so do those
   libraries until the functions at the end are called. See fine_clock.py.

   A clock a thousand times as fast: a profiler that counts microseconds then counts what really are nanoseconds.

   A trace: when, and from which place in its code, a library makes objects (operator new) on one thread, and when it
   reads the clock. A runtime that makes an object for each result shows so when each of its kernels begins, and no
   profiler needs to run. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FACTOR 1000
#define SECOND 1000000000LL

struct code {
    uintptr_t first, length;
};

struct entry {
    int64_t time;  /* of the monotonic clock, in ns */
    int64_t place; /* from the library's first instruction; below zero where it read the clock */
};

static int (*clock_of_libc)(clockid_t, struct timespec *);
static struct code hurried, traced;
static int64_t monotonic_start, readings;

static __thread __attribute__((tls_model("initial-exec"))) struct {
    struct entry *entries;
    int64_t room, count;
    const int64_t *places; /* what is kept; all where there are none */
    int64_t kept;
} trace;

__attribute__((constructor)) static void begin(void) {
    *(void **)&clock_of_libc = dlsym(RTLD_NEXT, "clock_gettime");
}

static int64_t now(clockid_t clock) {
    struct timespec read = {0, 0};
    if (clock_of_libc == NULL) begin(); /* constructors of other libraries come before this one's */
    clock_of_libc(clock, &read);
    return read.tv_sec * SECOND + read.tv_nsec;
}

static int is_of(const struct code *library, const void *caller) {
    return (uintptr_t)caller - library->first < library->length;
}

static void write_down(const void *caller, int reading) {
    if (trace.entries == NULL || !is_of(&traced, caller)) return;
    int64_t place = (int64_t)((uintptr_t)caller - traced.first);
    if (reading) place = -place;
    if (trace.kept != 0) {
        int64_t number = 0;
        while (number < trace.kept && trace.places[number] != place) number++;
        if (number == trace.kept) return;
    }
    if (trace.count < trace.room) trace.entries[trace.count] = (struct entry){now(CLOCK_MONOTONIC), place};
    trace.count++;
}

/* What XNNPACK's profiler reads. */
int clock_gettime(clockid_t clock, struct timespec *read) {
    if (clock == CLOCK_MONOTONIC && is_of(&hurried, __builtin_return_address(0))) {
        __atomic_fetch_add(&readings, 1, __ATOMIC_RELAXED);
        int64_t time = monotonic_start + (now(clock) - monotonic_start) * FACTOR;
        read->tv_sec = time / SECOND;
        read->tv_nsec = time % SECOND;
        return 0;
    }
    if (clock_of_libc == NULL) begin();
    return clock_of_libc(clock, read);
}

/* std::chrono::system_clock::now() of libstdc++, what ONNX Runtime's profiler reads. */
int64_t _ZNSt6chrono3_V212system_clock3nowEv(void) {
    write_down(__builtin_return_address(0), 1);
    return now(CLOCK_REALTIME);
}

/* operator new(size_t), which libstdc++ makes of malloc as well; where there is no memory its own one says so, since C
   cannot throw. Python loads libstdc++ for its extensions alone, so that dlsym with RTLD_NEXT would not find it. */
void *_Znwm(size_t size) {
    write_down(__builtin_return_address(0), 0);
    void *made = malloc(size == 0 ? 1 : size);
    if (made != NULL) return made;
    void *library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
    void *(*refuse)(size_t);
    *(void **)&refuse = dlsym(library == NULL ? RTLD_NEXT : library, "_Znwm");
    if (refuse == NULL) {
        fprintf(stderr, "no memory, and no libstdc++ to say so\n");
        abort();
    }
    return refuse(size);
}

struct search {
    const char *name;
    struct code found;
};

static int find(struct dl_phdr_info *library, size_t size, void *search) {
    (void)size;
    struct search *wanted = search;
    const char *slash = strrchr(library->dlpi_name, '/');
    if (strstr(slash == NULL ? library->dlpi_name : slash, wanted->name) == NULL) return 0;
    uintptr_t low = UINTPTR_MAX, high = 0;
    for (int number = 0; number < library->dlpi_phnum; number++) {
        const ElfW(Phdr) *segment = &library->dlpi_phdr[number];
        if (segment->p_type != PT_LOAD || !(segment->p_flags & PF_X)) continue;
        uintptr_t start = library->dlpi_addr + segment->p_vaddr;
        if (start < low) low = start;
        if (start + segment->p_memsz > high) high = start + segment->p_memsz;
    }
    if (high != 0) wanted->found = (struct code){low, high - low};
    return high != 0;
}

/* Whether `library` is now the one whose file's name contains `name`: the process has loaded it, and `library` was
   none before, or the same. */
static int becomes(struct code *library, const char *name) {
    struct search search = {name, {0, 0}};
    if (!dl_iterate_phdr(find, &search)) return 0;
    if (library->length != 0) return library->first == search.found.first;
    library->first = search.found.first;
    __atomic_store_n(&library->length, search.found.length, __ATOMIC_RELEASE); /* last: until now it is nobody */
    return 1;
}

/* The factor by which the clock of this library is faster from now on; 1 where the process has not loaded it, or
   another one has the fast clock. */
int latency_lab_fine_clock(const char *name) {
    if (hurried.length == 0) monotonic_start = now(CLOCK_MONOTONIC);
    return becomes(&hurried, name) ? FACTOR : 1;
}

/* How often the fast clock was read. */
int64_t latency_lab_fine_clock_readings(void) { return __atomic_load_n(&readings, __ATOMIC_RELAXED); }

/* Whether this library can be traced, by the same rule. */
int latency_lab_can_trace(const char *name) { return becomes(&traced, name); }

/* Writes down what the library does on this thread from now on, at `kept` places, or at all of them where that is 0. */
void latency_lab_trace(struct entry *entries, int64_t room, const int64_t *places, int64_t kept) {
    trace.room = room, trace.count = 0, trace.places = places, trace.kept = kept;
    trace.entries = entries;
}

/* Ends the trace of this thread. How many entries it has, or would have had room been for them. */
int64_t latency_lab_traced(void) {
    trace.entries = NULL;
    return trace.count;
}

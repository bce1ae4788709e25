/* A clock a thousand times as fast, for one library of the process that this file is preloaded into: a profiler that
   counts microseconds then counts what really are nanoseconds. Everything else in the process keeps its clock, and so
   does that library until latency_lab_fine_clock is called. See fine_clock.py.

   The clock can also leave out what ONNX Runtime's profiler does between its two readings around a kernel. It writes
   down what the kernel reads, then the kernel runs, then it writes down what was made, each into a string stream: the
   kernel runs from the end of the first stream to the beginning of the last. All that makes streams in the process
   therefore passes through here; only those of the library are looked at. */

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

static int (*clock_of_libc)(clockid_t, struct timespec *);
static uintptr_t first, length; /* the library's code */
static int64_t real_start, monotonic_start;
static int64_t readings, stops;
static int stands_still; /* while the profiler works */

static __thread struct {
    int64_t reading;     /* when this thread last read the clock */
    int64_t streams;     /* how many began since then */
    int64_t end, begin;  /* when the first of them ended, and when the last one began */
    int64_t stood_still; /* for how long the clock did so far */
} seen;

__attribute__((constructor)) static void begin(void) {
    *(void **)&clock_of_libc = dlsym(RTLD_NEXT, "clock_gettime");
}

static int64_t now(clockid_t clock) {
    struct timespec read = {0, 0};
    if (clock_of_libc == NULL) begin(); /* constructors of other libraries come before this one's */
    clock_of_libc(clock, &read);
    return read.tv_sec * SECOND + read.tv_nsec;
}

static int64_t fast(void) {
    int64_t time = now(CLOCK_MONOTONIC);
    __atomic_fetch_add(&readings, 1, __ATOMIC_RELAXED);
    if (stands_still && seen.reading != 0 && seen.reading < seen.end && seen.end <= seen.begin) {
        seen.stood_still += (seen.end - seen.reading) + (time - seen.begin);
        __atomic_fetch_add(&stops, 1, __ATOMIC_RELAXED);
    }
    seen.reading = time;
    seen.streams = 0;
    return (time - seen.stood_still - monotonic_start) * FACTOR;
}

static int served(const void *caller) { return (uintptr_t)caller - first < length; }

static int find(struct dl_phdr_info *library, size_t size, void *name) {
    (void)size;
    const char *slash = strrchr(library->dlpi_name, '/');
    if (strstr(slash == NULL ? library->dlpi_name : slash, name) == NULL) return 0;
    uintptr_t low = UINTPTR_MAX, high = 0;
    for (int number = 0; number < library->dlpi_phnum; number++) {
        const ElfW(Phdr) *segment = &library->dlpi_phdr[number];
        if (segment->p_type != PT_LOAD || !(segment->p_flags & PF_X)) continue;
        uintptr_t start = library->dlpi_addr + segment->p_vaddr;
        if (start < low) low = start;
        if (start + segment->p_memsz > high) high = start + segment->p_memsz;
    }
    if (high == 0) return 1;
    if (length != 0) return low == first ? FACTOR : 1;
    real_start = now(CLOCK_REALTIME);
    monotonic_start = now(CLOCK_MONOTONIC);
    first = low;
    __atomic_store_n(&length, high - low, __ATOMIC_RELEASE); /* last: until now nobody is served */
    return FACTOR;
}

/* Serves the library whose file's name contains `name` from now on, with a clock that leaves out what the profiler does
   around kernels if `still` says so. Returns the factor; another number where the process has loaded no such library, or
   another one is served. */
int latency_lab_fine_clock(const char *name, int still) {
    int factor = dl_iterate_phdr(find, (void *)name);
    if (factor == FACTOR) stands_still = still;
    return factor;
}

/* How often the fast clock was read, and before how many of these readings it had stood still. */
int64_t latency_lab_fine_clock_readings(void) { return __atomic_load_n(&readings, __ATOMIC_RELAXED); }
int64_t latency_lab_fine_clock_stops(void) { return __atomic_load_n(&stops, __ATOMIC_RELAXED); }

/* What XNNPACK's profiler reads. */
int clock_gettime(clockid_t clock, struct timespec *read) {
    if (clock == CLOCK_MONOTONIC && served(__builtin_return_address(0))) {
        int64_t time = monotonic_start + fast();
        read->tv_sec = time / SECOND;
        read->tv_nsec = time % SECOND;
        return 0;
    }
    if (clock_of_libc == NULL) begin();
    return clock_of_libc(clock, read);
}

/* std::chrono::system_clock::now() of libstdc++, what ONNX Runtime's profiler reads. Steps of the system's clock do not
   reach it. */
int64_t _ZNSt6chrono3_V212system_clock3nowEv(void) {
    return served(__builtin_return_address(0)) ? real_start + fast() : now(CLOCK_REALTIME);
}

/* Finds what stands behind a function of this file. Python loads libstdc++ for its extensions alone, so that dlsym with
   RTLD_NEXT would not find it. */
static void *behind(const char *name) {
    void *library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
    void *found = dlsym(library == NULL ? RTLD_NEXT : library, name);
    if (found == NULL) {
        fprintf(stderr, "the fine clock finds no %s: start the agent with fine_clock=off\n", name);
        abort();
    }
    return found;
}

/* The constructor of std::ios_base, with which every stream begins. */
void _ZNSt8ios_baseC2Ev(void *stream) {
    static void (*construct)(void *);
    if (construct == NULL) *(void **)&construct = behind("_ZNSt8ios_baseC2Ev");
    if (stands_still && served(__builtin_return_address(0))) {
        seen.streams++;
        seen.begin = now(CLOCK_MONOTONIC);
    }
    construct(stream);
}

/* The destructor of std::stringstream, which the profiler has; before another kind of stream nothing is left out. */
void _ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEED1Ev(void *stream) {
    static void (*destroy)(void *);
    if (destroy == NULL) *(void **)&destroy = behind("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEED1Ev");
    destroy(stream);
    if (stands_still && seen.streams == 1 && served(__builtin_return_address(0))) seen.end = now(CLOCK_MONOTONIC);
}

/* One pool of native threads per process, called the way TVM calls its own.
 *
 * A parallel loop compiled by TVM becomes a call of TVMBackendParallelLaunch(f, cdata, 0): run
 * f(task, env, cdata) for every task in [0, env->num_task), where the callee picks num_task and f
 * splits the loop by it. The signatures are those of tvm/runtime/c_backend_api.h.
 *
 * Every worker owns one word, alone on its cache line:
 *
 *     IDLE    the worker spins on it, for spin_ns after the last job
 *     ASLEEP  the worker gave up spinning and sleeps in the kernel until the word changes
 *     WORK    a task waits; whoever turns it back to IDLE runs the task
 *
 * The caller writes the job, puts WORK in the words it needs, wakes the sleepers and runs task 0.
 * Then it takes back every task that no worker has started, so a worker that is slow to wake costs
 * no more than one thread would, and last it waits for the rest. Taking back is safe with a
 * barrier in f: task 0 passes the barrier only after all others have started.
 *
 * One job runs at a time. A second caller, and a loop nested inside a task, find the pool taken
 * and run their whole loop themselves as a single task. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __linux__
#include <sched.h>
#include <string.h>
#endif

#include "wait.h"

#define EXPORT __attribute__((visibility("default")))
#define ALONE _Alignas(128) /* two lines: x86 fetches them in pairs, Apple's are that long */

enum { MAX_THREADS = 1024, PAUSES_PER_CLOCK = 16, SPINS_IN_JOB = 10 };
enum { IDLE, WORK, ASLEEP };
#define CALLER_ASLEEP 0x80000000u

typedef struct {
  void *sync_handle;
  int32_t num_task;
} ParallelEnv;
typedef int (*Task)(int task, ParallelEnv *env, void *cdata);

typedef struct {
  ALONE atomic_uint word;
  pthread_t thread;
#ifdef __linux__
  cpu_set_t cpus; /* where it may run */
#endif
} Worker;

typedef struct {
  ALONE atomic_uint arrived;
  atomic_uint round;
} Barrier;

static struct {
  ALONE atomic_bool taken;
  int workers; /* live threads; this and the job belong to the caller that took the pool */
  Task run;
  void *cdata;
  ParallelEnv env;
  ALONE atomic_uint pending; /* tasks that workers have not finished, and CALLER_ASLEEP */
  atomic_int failure;        /* the first non-zero result of a task */
  void *error;               /* what that task raised, if on a worker's thread */
  Barrier barrier;
  Worker worker[MAX_THREADS]; /* worker[i] runs task i; the first is unused */
} pool;

static _Thread_local int thread_limit; /* 0: default_limit */
static _Thread_local bool in_single_task;
static atomic_int default_limit = 1;
static atomic_int spin_ns = 10000;

/* TVM keeps a raised error in thread-local storage: a worker's has to be carried over. The first is
 * set last, so whoever sees it sees the others. */
static void (*_Atomic error_take)(void **error);
static void (*_Atomic error_raise)(void *error);
static int (*_Atomic error_release)(void *error);

/* ---- waiting ---- */

/* True once *word is value; false after spin_ns without it. While a job runs the clock starts
 * again, up to SPINS_IN_JOB times: without that, a worker woken too late for its task would sleep
 * again before the next one, and be too late for every job. */
static bool spin_until(atomic_uint *word, unsigned value) {
  int64_t end = 0, last = 0;
  for (;;) {
    for (int i = 0; i < PAUSES_PER_CLOCK; ++i) {
      if (atomic_load_explicit(word, memory_order_acquire) == value) return true;
      pause_cpu();
    }
    int64_t now = now_ns(), spin = atomic_load_explicit(&spin_ns, memory_order_relaxed);
    if (last == 0) last = now + SPINS_IN_JOB * spin;
    if (end == 0 || atomic_load_explicit(&pool.taken, memory_order_relaxed)) end = now + spin;
    if (now >= end || now >= last) return false;
  }
}

/* ---- placement ---- */

/* A scheduler may wake a worker on the very CPU of its waker, where it waits for the caller to
 * stop, or stops the caller, and the two run in turns. So a worker that starts or wakes may run
 * wherever the caller may, except on the CPU that the caller is on. */
#ifdef __linux__
typedef struct {
  bool known;
  cpu_set_t cpus;
} Placement;

static void find_placement(Placement *place) {
  if (place->known) return;
  place->known = true;
  if (sched_getaffinity(0, sizeof place->cpus, &place->cpus) != 0) CPU_ZERO(&place->cpus);
  int cpu = sched_getcpu();
  if (cpu >= 0 && CPU_COUNT(&place->cpus) > 1) CPU_CLR(cpu, &place->cpus);
}

static void place_worker(Worker *worker, Placement *place, bool fresh) {
  find_placement(place);
  if (CPU_COUNT(&place->cpus) == 0) return;
  if (!fresh && memcmp(&worker->cpus, &place->cpus, sizeof place->cpus) == 0) return;
  worker->cpus = place->cpus;
  pthread_setaffinity_np(worker->thread, sizeof place->cpus, &place->cpus);
}
#else
typedef struct {
  bool known;
} Placement;
static void place_worker(Worker *worker, Placement *place, bool fresh) {
  (void)worker, (void)place, (void)fresh;
}
#endif

/* ---- workers ---- */

/* The right to run the task behind a word passes to whoever succeeds here. */
static bool claim(atomic_uint *word) {
  unsigned expected = WORK;
  return atomic_compare_exchange_strong(word, &expected, IDLE);
}

static void wait_for_work(atomic_uint *word) {
  while (!claim(word)) {
    if (spin_until(word, WORK)) continue;
    unsigned expected = IDLE;
    if (!atomic_compare_exchange_strong(word, &expected, ASLEEP)) continue;
    while (atomic_load_explicit(word, memory_order_acquire) == ASLEEP) park(word, ASLEEP);
  }
}

/* Keeps the first failure. True if it was this one. */
static bool fail(int result) {
  int none = 0;
  if (!atomic_compare_exchange_strong(&pool.failure, &none, result)) return false;
  atomic_fetch_add(&pool.barrier.round, 1); /* nobody may wait there for a task that gave up */
  unpark(&pool.barrier.round);
  return true;
}

static void *work(void *argument) {
  int task = (int)(intptr_t)argument;
  for (;;) {
    wait_for_work(&pool.worker[task].word);
    ParallelEnv env = pool.env;
    int result = pool.run(task, &env, pool.cdata);
    if (result != 0 && fail(result)) {
      void (*take)(void **) = atomic_load(&error_take);
      if (take) take(&pool.error);
    }
    if (atomic_fetch_sub(&pool.pending, 1) == (CALLER_ASLEEP | 1)) unpark(&pool.pending);
  }
  return NULL;
}

/* Grows the pool to `threads`, the caller included; returns what it got. */
static int grow(int threads, Placement *place) {
  if (pool.workers + 1 >= threads) return threads;
  pthread_attr_t attributes;
  sigset_t all, old;
  if (pthread_attr_init(&attributes) != 0) return pool.workers + 1;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  sigfillset(&all); /* signals are for the threads of the program, not for ours */
  pthread_sigmask(SIG_SETMASK, &all, &old);
  while (pool.workers + 1 < threads) {
    int task = pool.workers + 1;
    Worker *worker = &pool.worker[task];
    if (pthread_create(&worker->thread, &attributes, work, (void *)(intptr_t)task) != 0) break;
    place_worker(worker, place, true);
    ++pool.workers;
  }
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attributes);
  return pool.workers + 1 < threads ? pool.workers + 1 : threads;
}

/* The child of a fork has no workers and, whatever the parent was doing, no job. */
static void start_afresh(void) {
  for (int i = 0; i <= pool.workers + 1 && i < MAX_THREADS; ++i) { /* one may have been starting */
    atomic_store(&pool.worker[i].word, IDLE);
  }
  pool.workers = 0;
  park_in_child();
  atomic_store(&pool.taken, false);
}

__attribute__((constructor)) static void survive_fork(void) {
  pthread_atfork(NULL, NULL, start_afresh);
}

/* ---- the caller ---- */

static int run_job(int tasks, Placement *place) {
  pool.env = (ParallelEnv){&pool.barrier, tasks};
  pool.error = NULL;
  atomic_store_explicit(&pool.failure, 0, memory_order_relaxed);
  atomic_store_explicit(&pool.barrier.arrived, 0, memory_order_relaxed);
  atomic_store_explicit(&pool.pending, (unsigned)tasks - 1, memory_order_relaxed);
  for (int task = 1; task < tasks; ++task) {
    Worker *worker = &pool.worker[task];
    if (atomic_exchange(&worker->word, WORK) != ASLEEP) continue;
    place_worker(worker, place, false);
    unpark(&worker->word);
  }

  ParallelEnv env = pool.env;
  int result = pool.run(0, &env, pool.cdata);
  if (result != 0) fail(result);
  for (int task = tasks - 1; task > 0; --task) { /* the last were woken last */
    if (!claim(&pool.worker[task].word)) continue;
    if (result == 0 && (result = pool.run(task, &env, pool.cdata)) != 0) fail(result);
    atomic_fetch_sub(&pool.pending, 1);
  }

  if (!spin_until(&pool.pending, 0)) {
    unsigned left = atomic_fetch_or(&pool.pending, CALLER_ASLEEP) | CALLER_ASLEEP;
    while (left != CALLER_ASLEEP) {
      park(&pool.pending, left);
      left = atomic_load_explicit(&pool.pending, memory_order_acquire);
    }
  }
  if (pool.error) {
    atomic_load(&error_raise)(pool.error);
    atomic_load(&error_release)(pool.error);
  }
  return atomic_load_explicit(&pool.failure, memory_order_relaxed);
}

/* TVMBackendParallelLaunch. num_task 0 asks for the thread limit; more than the limit is not given.
 * Returns 0, or the result of a task that failed. */
EXPORT int sparsify_pool_launch(Task run, void *cdata, int num_task) {
  int tasks = thread_limit ? thread_limit : atomic_load(&default_limit);
  if (num_task > 0 && num_task < tasks) tasks = num_task;
  if (tasks > 1 && !in_single_task &&
      !atomic_exchange_explicit(&pool.taken, true, memory_order_acquire)) {
    Placement place = {.known = false};
    tasks = grow(tasks, &place);
    if (tasks > 1) {
      pool.run = run;
      pool.cdata = cdata;
      int result = run_job(tasks, &place);
      atomic_store_explicit(&pool.taken, false, memory_order_release);
      return result;
    }
    atomic_store_explicit(&pool.taken, false, memory_order_release);
  }
  ParallelEnv alone = {NULL, 1};
  bool before = in_single_task;
  in_single_task = true;
  int result = run(0, &alone, cdata);
  in_single_task = before;
  return result;
}

/* TVMBackendParallelBarrier: returns 0 when all tasks have arrived, -1 when one has failed. */
EXPORT int sparsify_pool_barrier(int task, ParallelEnv *env) {
  (void)task;
  if (env->num_task <= 1) return 0;
  Barrier *barrier = env->sync_handle;
  unsigned round = atomic_load(&barrier->round);
  if (atomic_load(&pool.failure)) return -1;
  if (atomic_fetch_add(&barrier->arrived, 1) + 1 == (unsigned)env->num_task) {
    atomic_store(&barrier->arrived, 0);
    atomic_fetch_add(&barrier->round, 1);
    unpark(&barrier->round);
  } else {
    spin_until(&barrier->round, round + 1);
    while (atomic_load(&barrier->round) == round) park(&barrier->round, round);
  }
  return atomic_load(&pool.failure) ? -1 : 0;
}

/* ---- settings ---- */

EXPORT int sparsify_pool_max_threads(void) { return MAX_THREADS; }

/* Threads for launches of the calling thread; 0 means the default. Returns the number before, or
 * -1 where there is no such number. */
EXPORT int sparsify_pool_set_threads(int threads) {
  if (threads < 0 || threads > MAX_THREADS) return -1;
  int before = thread_limit;
  thread_limit = threads;
  return before;
}

EXPORT int sparsify_pool_threads(void) {
  return thread_limit ? thread_limit : atomic_load(&default_limit);
}

EXPORT void sparsify_pool_set_default(int threads) { atomic_store(&default_limit, threads); }

EXPORT void sparsify_pool_set_spin(int nanoseconds) { atomic_store(&spin_ns, nanoseconds); }

/* TVMFFIErrorMoveFromRaised, TVMFFIErrorSetRaised and TVMFFIObjectDecRef, once TVM is loaded. */
EXPORT void sparsify_pool_set_error_functions(void (*take)(void **), void (*raise)(void *),
                                              int (*release)(void *)) {
  atomic_store(&error_raise, raise);
  atomic_store(&error_release, release);
  atomic_store(&error_take, take);
}

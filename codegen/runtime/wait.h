/* How a thread waits for a word in memory to change: by a pause, by the clock, or asleep. */

#ifndef SPARSIFY_WAIT_H
#define SPARSIFY_WAIT_H

#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

static void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__ARM_ARCH) && __ARM_ARCH >= 7)
  __asm__ __volatile__("yield");
#else
  atomic_signal_fence(memory_order_seq_cst);
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* park sleeps while *word is value (it may also return early); unpark wakes all who do.
 * park_in_child makes both usable in the child of a fork. */
#ifdef __linux__
static void park(atomic_uint *word, unsigned value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void unpark(atomic_uint *word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}
static void park_in_child(void) {}
#else
static pthread_mutex_t park_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t park_changed = PTHREAD_COND_INITIALIZER;
static void park(atomic_uint *word, unsigned value) {
  pthread_mutex_lock(&park_mutex);
  while (atomic_load(word) == value) pthread_cond_wait(&park_changed, &park_mutex);
  pthread_mutex_unlock(&park_mutex);
}
static void unpark(atomic_uint *word) {
  (void)word;
  pthread_mutex_lock(&park_mutex); /* the word has changed: no sleeper can miss it from here on */
  pthread_cond_broadcast(&park_changed);
  pthread_mutex_unlock(&park_mutex);
}
static void park_in_child(void) {
  park_mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
  park_changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}
#endif

#endif

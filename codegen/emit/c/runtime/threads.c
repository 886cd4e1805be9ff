/* Parallel loops on the thread pool of pool.c; one thread until sparsify_set_threads. */

#include <string.h>

#include "launch.h"

int sparsify_pool_launch(sparsify_task *run, void *closure, int tasks);
void sparsify_pool_set_default(int threads);
int sparsify_pool_max_threads(void);
void sparsify_pool_set_error_functions(void (*take)(void **), void (*raise)(void *),
                                       int (*release)(void *));

/* A worker's message, carried to the thread that launched. */
static void take(void **error) { *error = sparsify_message(); }
static void carry(void *error) { strcpy(sparsify_message(), error); }
static int release(void *error) {
  (void)error;
  return 0;
}

typedef struct {
  const sparsify_entry *entry;
  sparsify_task *run;
  void *closure;
} Job;

static int run_one(int task, sparsify_tasks *tasks, void *closure) {
  const Job *job = closure;
  return sparsify_run_task(job->entry, job->run, task, tasks, job->closure);
}

int sparsify_launch(sparsify_task *run, void *closure, int tasks) {
  Job job = {sparsify_running(), run, closure}; /* outlives the launch, which waits for all tasks */
  return sparsify_pool_launch(run_one, &job, tasks);
}

int sparsify_set_threads(int threads) {
  if (threads < 1 || threads > sparsify_pool_max_threads()) return SPARSIFY_WRONG_SIZE;
  sparsify_pool_set_error_functions(take, carry, release);
  sparsify_pool_set_default(threads);
  return SPARSIFY_OK;
}

/* Parallel loops on the calling thread. */

#include "launch.h"

int sparsify_launch(sparsify_task *run, void *closure, int tasks) {
  sparsify_tasks one = {NULL, 1};
  (void)tasks;
  return sparsify_run_task(sparsify_running(), run, 0, &one, closure);
}

int sparsify_set_threads(int threads) { return threads == 1 ? SPARSIFY_OK : SPARSIFY_WRONG_SIZE; }

/* Stands between main.c and the exported model: tells on stderr how long each run took, in
 * nanoseconds, one line a run. main.c is compiled with -Dmodel_run_entry=timed_model_run_entry. */
#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <time.h>

#include "model.h"

#ifdef MODEL_STATE_BYTES
#define STATE(...) __VA_ARGS__ /* an argument more */
#else
#define STATE(...)
#endif

int timed_model_run_entry(int entry, const sparsify_tensor *inputs, sparsify_tensor *outputs,
                          STATE(model_state *state, ) void *workspace, size_t workspace_bytes);

int timed_model_run_entry(int entry, const sparsify_tensor *inputs, sparsify_tensor *outputs,
                          STATE(model_state *state, ) void *workspace, size_t workspace_bytes) {
  struct timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  int status = model_run_entry(entry, inputs, outputs, STATE(state, ) workspace, workspace_bytes);
  clock_gettime(CLOCK_MONOTONIC, &end);
  fprintf(stderr, "%lld\n",
          (end.tv_sec - begin.tv_sec) * 1000000000LL + (end.tv_nsec - begin.tv_nsec));
  return status;
}

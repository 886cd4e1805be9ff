/* LayerNorm and RmsNorm over the last axis. */

#include <string.h>

#include "library.h"

typedef struct {
  const Operator *op;
  const OrtApi *api;
  float epsilon;
} Norm;

static OrtStatus *create(const Operator *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **made) {
  Norm *norm = allocate(sizeof *norm);
  if (!norm) return out_of_memory(api);
  *norm = (Norm){op, api, 0};
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_float)(info, "epsilon", &norm->epsilon);
  if (status) {
    release(norm);
    return status;
  }
  *made = norm;
  return NULL;
}

static OrtStatus *compute(void *made, OrtKernelContext *context) {
  const Norm *norm = made;
  const OrtApi *api = norm->api;
  bool layer = norm->op->family == LAYER_NORM;
  Tensor x, scale, shift;
  TRY(input_of(api, context, 0, &x));
  TRY(input_of(api, context, 1, &scale));
  if (layer) TRY(input_of(api, context, 2, &shift));
  int64_t features = x.dims ? x.extent[x.dims - 1] : 0;
  if (!x.dims || count_of(&scale, 0, scale.dims) != features ||
      (layer && count_of(&shift, 0, shift.dims) != features))
    return fail(api, ORT_INVALID_ARGUMENT, "%s: x has %lld features, weight or bias has others",
                norm->op->name, (long long)features);
  float *y;
  TRY(output_of(api, context, x.extent, x.dims, &y));
  int64_t tokens = tokens_of(&x), room = (features + 15) / 16 * 16;
  if (tokens * features == 0) return NULL;
  float *aligned = borrow((size_t)(2 * room)); /* the file's tensors need not be */
  if (!aligned) return out_of_memory(api);
  memcpy(aligned, scale.data, (size_t)features * sizeof *aligned);
  if (layer) memcpy(aligned + room, shift.data, (size_t)features * sizeof *aligned);
  Call call = {0};
  pass(&call, x.data, F32, 2, tokens, features);
  pass(&call, aligned, F32, 1, features);
  if (layer) pass(&call, aligned + room, F32, 1, features);
  pass_number(&call, norm->epsilon);
  pass(&call, y, F32, 2, tokens, features);
  OrtStatus *status = run(api, context, layer ? layer_norm_kernel : rms_norm_kernel, &call);
  give_back(aligned);
  return status;
}

const Implementation norm_family = {create, compute, release};

/* Gated... and Rotary: operators that treat every token alike. */

#include <string.h>

#include "library.h"

typedef struct {
  const Operator *op;
  const OrtApi *api;
  int64_t heads, head_dim; /* of Rotary */
} PerToken;

static OrtStatus *create(const Operator *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **made) {
  PerToken *kernel = allocate(sizeof *kernel);
  if (!kernel) return out_of_memory(api);
  *kernel = (PerToken){op, api, 0, 0};
  OrtStatus *status = NULL;
  if (op->family == ROTARY) {
    status = ORT(api, KernelInfoGetAttribute_int64)(info, "heads", &kernel->heads);
    if (!status)
      status = ORT(api, KernelInfoGetAttribute_int64)(info, "head_dim", &kernel->head_dim);
    if (!status && (kernel->heads < 1 || kernel->head_dim < 2 || kernel->head_dim % 2))
      status = fail(api, ORT_INVALID_ARGUMENT, "%s: %lld heads of %lld features", op->name,
                    (long long)kernel->heads, (long long)kernel->head_dim);
  }
  if (status) {
    release(kernel);
    return status;
  }
  *made = kernel;
  return NULL;
}

static OrtStatus *gate(void *made, OrtKernelContext *context) {
  const PerToken *kernel = made;
  const OrtApi *api = kernel->api;
  Tensor x;
  TRY(input_of(api, context, 0, &x));
  int64_t features = x.dims ? x.extent[x.dims - 1] : 0, tokens = tokens_of(&x);
  if (!x.dims || features % 2)
    return fail(api, ORT_INVALID_ARGUMENT, "%s: x has %lld features, no even number",
                kernel->op->name, (long long)features);
  int64_t extents[MAX_DIMS];
  memcpy(extents, x.extent, sizeof extents);
  extents[x.dims - 1] = features / 2;
  float *y;
  TRY(output_of(api, context, extents, x.dims, &y));
  if (tokens * features == 0) return NULL;
  Call call = {0};
  pass(&call, x.data, F32, 2, tokens, features);
  pass(&call, y, F32, 2, tokens, features / 2);
  return run(api, context, gated_kernels[kernel->op->activation], &call);
}

static OrtStatus *turn(void *made, OrtKernelContext *context) {
  const PerToken *kernel = made;
  const OrtApi *api = kernel->api;
  int64_t turned = kernel->heads * kernel->head_dim;
  Tensor x, angles[2];
  TRY(input_of(api, context, 0, &x));
  int64_t features = x.dims ? x.extent[x.dims - 1] : 0, tokens = tokens_of(&x);
  bool fits = x.dims && features >= turned;
  for (size_t i = 0; i < 2; ++i) {
    TRY(input_of(api, context, 1 + i, &angles[i]));
    fits = fits && count_of(&angles[i], 0, angles[i].dims) == tokens * kernel->head_dim;
  }
  if (!fits)
    return fail(api, ORT_INVALID_ARGUMENT,
                "%s: x has %lld features for %lld heads of %lld, and cos and sin must have as many "
                "tokens as x",
                kernel->op->name, (long long)features, (long long)kernel->heads,
                (long long)kernel->head_dim);
  float *y;
  TRY(output_of(api, context, x.extent, x.dims, &y));
  if (tokens == 0) return NULL;
  Call call = {0};
  pass(&call, x.data, F32, 2, tokens, features);
  for (size_t i = 0; i < 2; ++i) pass(&call, angles[i].data, F32, 2, tokens, kernel->head_dim);
  pass_integer(&call, kernel->heads);
  pass(&call, y, F32, 2, tokens, features);
  return run(api, context, rotary_kernel, &call);
}

const Implementation gated_family = {create, gate, release};
const Implementation rotary_family = {create, turn, release};

/* Attention..., BlockAttention...: softmax(q k^T * scale + mask) v for each head. */

#include <string.h>

#include "library.h"

typedef struct {
  const Operator *op;
  const OrtApi *api;
  int64_t heads, kv_heads, head_dim, offsets[3];
  int64_t causal, window, sinks, block[2]; /* a window of 0 is none */
  float scale, softcap;
} Attention;

#define LISTS 4 /* counts and indices of partial blocks, then of full ones */

/* Of one call. */
typedef struct {
  Tensor input[3]; /* query, key, value */
  Tensor list[LISTS], mask;
  int64_t batch, queries, keys, features; /* of the result */
} Operands;

static OrtStatus *read_attributes(Attention *attention, const OrtKernelInfo *info) {
  const OrtApi *api = attention->api;
  size_t count = 3;
  TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "heads", &attention->heads));
  TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "kv_heads", &attention->kv_heads));
  TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "head_dim", &attention->head_dim));
  TRY(ORT(api, KernelInfoGetAttribute_float)(info, "scale", &attention->scale));
  TRY(ORT(api, KernelInfoGetAttributeArray_int64)(info, "offsets", attention->offsets, &count));
  attention->causal = attention->op->causal;
  if (attention->op->window) {
    TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "window", &attention->window));
    TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "sinks", &attention->sinks));
  }
  if (attention->op->softcap)
    TRY(ORT(api, KernelInfoGetAttribute_float)(info, "softcap", &attention->softcap));
  if (attention->op->listed) {
    size_t sizes = 2;
    TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "causal", &attention->causal));
    TRY(ORT(api, KernelInfoGetAttributeArray_int64)(info, "block", attention->block, &sizes));
    const int64_t *block = attention->block;
    if (sizes != 2 || block[0] <= 0 || block[0] % 32 || block[1] <= 0 || block[1] % 16)
      return fail(api, ORT_INVALID_ARGUMENT,
                  "%s: blocks must have a multiple of 32 queries and a multiple of 16 keys",
                  attention->op->name);
  }
  bool sound = attention->window >= 0 && attention->sinks >= 0 && attention->softcap >= 0 &&
               attention->heads > 0 && attention->kv_heads > 0 && attention->head_dim > 0 &&
               attention->heads % attention->kv_heads == 0 && count == 3;
  for (size_t i = 0; i < 3; ++i) sound = sound && attention->offsets[i] >= 0;
  return sound ? NULL
               : fail(api, ORT_INVALID_ARGUMENT, "%s: %lld heads of %lld features over %lld key heads",
                      attention->op->name, (long long)attention->heads,
                      (long long)attention->head_dim, (long long)attention->kv_heads);
}

static OrtStatus *create(const Operator *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **made) {
  Attention *attention = allocate(sizeof *attention);
  if (!attention) return out_of_memory(api);
  *attention = (Attention){.op = op, .api = api};
  OrtStatus *status = read_attributes(attention, info);
  if (status) {
    release(attention);
    return status;
  }
  *made = attention;
  return NULL;
}

/* An extent of the mask: 1, or as large as that of the scores. */
static bool broadcasts(int64_t extent, int64_t whole) { return extent == 1 || extent == whole; }

static int64_t blocks_of(int64_t length, int64_t size) { return (length + size - 1) / size; }

static OrtStatus *check_lists(const Attention *attention, const Operands *given) {
  bool fits = true;
  for (size_t i = 0; i < LISTS; ++i) {
    const Tensor *list = &given->list[i], *counts = &given->list[i / 2 * 2];
    fits = fits && list->type == ORT_INT32 && list->dims == 3 + i % 2 && list->extent[0] > 0 &&
           list->extent[1] > 0 && given->batch % list->extent[0] == 0 &&
           attention->heads % list->extent[1] == 0 &&
           list->extent[2] == blocks_of(given->queries, attention->block[0]) &&
           memcmp(list->extent, counts->extent, 3 * sizeof(int64_t)) == 0 &&
           memcmp(list->extent, given->list[0].extent, 3 * sizeof(int64_t)) == 0;
  }
  return fits ? NULL
              : fail(attention->api, ORT_INVALID_ARGUMENT,
                     "%s: lists must be [1 or batch, a divisor of heads, blocks of %lld queries], "
                     "those of indices with one dimension more",
                     attention->op->name, (long long)attention->block[0]);
}

static OrtStatus *check(const Attention *attention, const Operands *given) {
  const Tensor *input = given->input;
  bool fits = true;
  for (size_t i = 0; i < 3; ++i) {
    int64_t heads = i ? attention->kv_heads : attention->heads;
    fits = fits && input[i].dims == 3 && input[i].extent[0] == input[0].extent[0] &&
           attention->offsets[i] + heads * attention->head_dim <= input[i].extent[2];
  }
  fits = fits && input[1].extent[1] == input[2].extent[1];
  if (fits && attention->op->mask != MASK_NONE) {
    const Tensor *mask = &given->mask;
    int type = attention->op->mask == MASK_BOOL ? ORT_BOOL : ORT_FLOAT;
    fits = mask->dims == 4 && mask->type == type && broadcasts(mask->extent[0], given->batch) &&
           broadcasts(mask->extent[1], attention->heads) &&
           broadcasts(mask->extent[2], given->queries) && broadcasts(mask->extent[3], given->keys);
  }
  return fits ? NULL
              : fail(attention->api, ORT_INVALID_ARGUMENT,
                     "%s: query, key and value must be [batch, length, features] with room for "
                     "their heads, and the mask broadcastable to [batch, heads, queries, keys]",
                     attention->op->name);
}

/* The mask as kernels add it: keys major, queries padded. One key that stands for all is spread. */
static OrtStatus *prepare_mask(const Attention *attention, OrtKernelContext *context,
                               const Operands *given, int64_t padded, float *made, uint8_t *spread) {
  Tensor mask = given->mask;
  const int64_t *extent = mask.extent;
  int64_t rows = extent[0] * extent[1] * extent[2];
  size_t size = attention->op->mask == MASK_BOOL ? 1 : sizeof(float);
  const void *data = mask.data;
  if (extent[3] != given->keys) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t key = 0; key < given->keys; ++key)
        memcpy(spread + (size_t)(row * given->keys + key) * size,
               (const uint8_t *)mask.data + (size_t)row * size, size);
    data = spread;
  }
  Call call = {0};
  pass(&call, data, size == 1 ? U8 : F32, 4, extent[0], extent[1], extent[2], given->keys);
  pass(&call, made, F32, 4, extent[0], extent[1], given->keys, padded);
  return run(attention->api, context, mask_kernels[size == 1 ? 0 : 1], &call);
}

/* Lays out memory: each part begins on a cache line. */
static float *take(float **next, int64_t floats) {
  float *taken = *next;
  *next += (floats + 15) / 16 * 16;
  return taken;
}

static OrtStatus *attend(const Attention *attention, OrtKernelContext *context,
                         const Operands *given, float *y, float *memory) {
  const OrtApi *api = attention->api;
  const Operator *op = attention->op;
  const Tensor *input = given->input;
  const float *lanes[3];
  float *next = memory;
  int64_t groups[3];
  for (size_t i = 0; i < 3; ++i) {
    int64_t tokens = tokens_of(&input[i]), features = input[i].extent[2];
    groups[i] = (tokens + 15) / 16;
    size_t same = 0; /* one tensor may serve as all three */
    while (same < i && (input[same].data != input[i].data ||
                        memcmp(input[same].extent, input[i].extent, 3 * sizeof(int64_t)) != 0))
      ++same;
    if (same < i) {
      lanes[i] = lanes[same];
      continue;
    }
    float *made = take(&next, groups[i] * features * 16);
    Call call = {0};
    pass(&call, input[i].data, F32, 2, tokens, features);
    pass(&call, made, F32, 3, groups[i], features, INT64_C(16));
    TRY(run(api, context, to_lanes_kernel, &call));
    lanes[i] = made;
  }
  Call call = {0};
  for (size_t i = 0; i < 3; ++i)
    pass(&call, lanes[i], F32, 3, groups[i], input[i].extent[2], INT64_C(16));
  size_t kind = 0;
  if (op->mask != MASK_NONE) {
    const int64_t *extent = given->mask.extent;
    bool by_query = extent[2] != 1;
    int64_t padded = by_query ? (given->queries + 63) / 64 * 64 : 1;
    int64_t planes = extent[0] * extent[1], plane = given->keys * padded;
    float *made = take(&next, planes * plane);
    uint8_t *spread = (uint8_t *)take(&next, planes * extent[2] * given->keys);
    TRY(prepare_mask(attention, context, given, padded, made, spread));
    pass(&call, made, F32, 3, planes, given->keys, padded);
    pass_integer(&call, extent[0] == 1 ? 0 : extent[1] * plane);
    pass_integer(&call, extent[1] == 1 ? 0 : plane);
    kind = by_query ? 2 : 1;
  }
  if (op->listed) {
    kind += 3;
    for (size_t i = 0; i < LISTS; ++i) {
      const int64_t *extent = given->list[i].extent;
      pass(&call, given->list[i].data, I32, 3 + (int)(i % 2), extent[0], extent[1], extent[2],
           extent[3]);
    }
    pass_integer(&call, attention->block[0]);
    pass_integer(&call, attention->block[1]);
  }
  int64_t everything = given->queries + given->keys;
  int64_t reach = attention->causal ? 0 : everything; /* how far ahead of itself a query sees */
  int64_t window = attention->window ? attention->window : everything;
  const int64_t integers[] = {given->batch,          given->queries,        given->keys,
                              reach,                 window,                attention->sinks,
                              attention->heads,      attention->kv_heads,   attention->head_dim,
                              attention->offsets[0], attention->offsets[1], attention->offsets[2]};
  for (size_t i = 0; i < sizeof integers / sizeof *integers; ++i) pass_integer(&call, integers[i]);
  pass_number(&call, attention->scale);
  pass_number(&call, attention->softcap);
  float *y_lanes = take(&next, groups[0] * given->features * 16);
  pass(&call, y_lanes, F32, 3, groups[0], given->features, INT64_C(16));
  TRY(run(api, context, attention_kernels[kind], &call));
  float *zeros = take(&next, given->features);
  memset(zeros, 0, (size_t)given->features * sizeof *zeros);
  Call leave = {0};
  pass(&leave, y_lanes, F32, 3, groups[0], given->features, INT64_C(16));
  pass(&leave, zeros, F32, 1, given->features);
  pass(&leave, y, F32, 2, given->batch * given->queries, given->features);
  return run(api, context, from_lanes_kernel, &leave);
}

/* What `attend` takes at most. */
static size_t memory_of(const Operands *given) {
  int64_t floats = 8 * 16 + given->features;
  for (size_t i = 0; i < 3; ++i)
    floats += (tokens_of(&given->input[i]) + 15) * given->input[i].extent[2];
  floats += (given->batch * given->queries + 15) * given->features;
  const int64_t *extent = given->mask.extent;
  if (given->mask.dims == 4)
    floats += extent[0] * extent[1] * given->keys * ((extent[2] + 63) / 64 * 64 + extent[2]);
  return (size_t)floats;
}

static OrtStatus *compute(void *made, OrtKernelContext *context) {
  const Attention *attention = made;
  const OrtApi *api = attention->api;
  Operands given = {0};
  for (size_t i = 0; i < 3; ++i) TRY(input_of(api, context, i, &given.input[i]));
  size_t inputs = 3;
  for (size_t i = 0; attention->op->listed && i < LISTS; ++i)
    TRY(input_of(api, context, inputs++, &given.list[i]));
  if (attention->op->mask != MASK_NONE) TRY(input_of(api, context, inputs, &given.mask));
  given.batch = given.input[0].extent[0];
  given.queries = given.input[0].extent[1];
  given.keys = given.input[1].extent[1];
  given.features = attention->heads * attention->head_dim;
  TRY(check(attention, &given));
  if (attention->op->listed && given.keys) TRY(check_lists(attention, &given));
  const int64_t extents[] = {given.batch, given.queries, given.features};
  float *y;
  TRY(output_of(api, context, extents, 3, &y));
  if (given.batch * given.queries == 0) return NULL;
  if (given.keys == 0) {
    memset(y, 0, (size_t)(given.batch * given.queries * given.features) * sizeof *y);
    return NULL;
  }
  float *memory = borrow(memory_of(&given));
  if (!memory) return out_of_memory(api);
  OrtStatus *status = attend(attention, context, &given, y, memory);
  give_back(memory);
  return status;
}

const Implementation attention_family = {create, compute, release};

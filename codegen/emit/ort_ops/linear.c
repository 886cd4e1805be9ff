/* Linear..., ActiveLinear...: y = activation(x @ W.T + bias) + residual; GatedLinear...: times a
 * gate. */

#include <string.h>

#include "linear.h"

static size_t weight_inputs(Storage storage) {
  return storage == CSR ? 3 : storage == BITMAP ? 2 : 1;
}

static void destroy(void *made) {
  Linear *linear = made;
  free_weight(&linear->weight);
  release(linear->bias);
  release(linear->matrix.values);
  pthread_mutex_destroy(&linear->mutex);
  release(linear);
}

static OrtStatus *pack(const Linear *linear, const Tensor *tensors, Weight *made) {
  Csr csr;
  OrtStatus *status =
      read_weight(linear->api, linear->op->storage, tensors, linear->rows, linear->columns, &csr);
  if (!status) status = pack_weight(linear->api, &csr, made);
  free_csr(&csr);
  return status;
}

static OrtStatus *pack_constants(Linear *linear, const OrtKernelInfo *info) {
  Tensor tensors[3];
  size_t count = weight_inputs(linear->op->storage);
  linear->constant = true;
  for (size_t i = 0; i < count; ++i) {
    const OrtValue *value = NULL;
    int constant = 0;
    TRY(ORT(linear->api, KernelInfoGetConstantInput_tensor)(info, 1 + i, &constant, &value));
    linear->constant = linear->constant && constant && value;
    if (linear->constant) TRY(tensor_of(linear->api, value, &tensors[i]));
  }
  return linear->constant ? pack(linear, tensors, &linear->weight) : NULL;
}

static OrtStatus *create(const Operator *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **made) {
  Linear *linear = allocate(sizeof *linear);
  if (!linear) return out_of_memory(api);
  *linear = (Linear){.op = op, .api = api, .mutex = PTHREAD_MUTEX_INITIALIZER};
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_int64)(info, "out_features", &linear->rows);
  if (!status)
    status = ORT(api, KernelInfoGetAttribute_int64)(info, "in_features", &linear->columns);
  if (!status) status = pack_constants(linear, info);
  if (!status && linear->rows > 0) {
    size_t bytes = (size_t)linear->rows * sizeof *linear->bias;
    linear->bias = allocate(bytes);
    if (linear->bias) memset(linear->bias, 0, bytes);
    else status = out_of_memory(api);
  }
  if (status) {
    destroy(linear);
    return status;
  }
  *made = linear;
  return NULL;
}

/* Where there is no kernel for the activation and the residual together. */
static void add(float *y, const float *residual, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += residual[i];
}

static OrtStatus *multiply(const Linear *linear, const Weight *weight, OrtKernelContext *context,
                           int64_t tokens, const float *x, const float *bias,
                           const float *residual, float *y, float *scratch) {
  const OrtApi *api = linear->api;
  const TiledKernels *kernels = weight->sparse ? &sell_kernels : &dense_kernels;
  int64_t groups = (tokens + 15) / 16, features = weight->columns;
  int64_t y_features = 1 + (weight->sparse ? weight->rows : weight->panel_count * kernels->rows);
  float *x_tiles = scratch, *y_tiles = scratch + groups * 16 * features;
  Call enter = {0};
  pass(&enter, x, F32, 2, tokens, features);
  pass(&enter, x_tiles, F32, 3, groups, features, INT64_C(16));
  TRY(run(api, context, kernels->to_tiles, &enter));
  Call sums = {0};
  pass(&sums, x_tiles, F32, 3, groups, features, INT64_C(16));
  if (weight->sparse) {
    const Sell *sell = &weight->sell;
    pass(&sums, sell->starts, I32, 1, sell->entries);
    pass(&sums, sell->outputs, I32, 1, sell->slots);
    pass(&sums, sell->columns, I64, 1, sell->stream);
    pass(&sums, sell->values, F32, 1, sell->tail);
    pass_integer(&sums, sell->k_block);
    pass_integer(&sums, sell->window / sell->rows);
  } else {
    pass(&sums, weight->panels, F32, 3, weight->panel_count, features, kernels->rows);
  }
  pass(&sums, y_tiles, F32, 3, groups, y_features, INT64_C(16));
  TRY(run(api, context, kernels->multiply, &sums));
  bool fused = residual && linear->op->activation == 0;
  Call leave = {0};
  pass(&leave, y_tiles, F32, 3, groups, y_features, INT64_C(16));
  pass(&leave, bias, F32, 1, weight->rows);
  if (fused) pass(&leave, residual, F32, 2, tokens, weight->rows);
  pass(&leave, y, F32, 2, tokens, weight->rows);
  Kernel *last = fused ? kernels->from_tiles_residual : kernels->from_tiles[linear->op->activation];
  TRY(run(api, context, last, &leave));
  if (residual && !fused) add(y, residual, tokens * weight->rows);
  return NULL;
}

/* The weight's tensors as inputs of this call. */
static OrtStatus *weight_of(const Linear *linear, OrtKernelContext *context, Tensor *tensors) {
  for (size_t i = 0; i < weight_inputs(linear->op->storage); ++i)
    TRY(input_of(linear->api, context, 1 + i, &tensors[i]));
  return NULL;
}

OrtStatus *find_matrix(Linear *linear, OrtKernelContext *context, Matrix *found) {
  pthread_mutex_lock(&linear->mutex);
  OrtStatus *status = NULL;
  if (!linear->matrix.values) {
    Tensor tensors[3];
    Csr csr = {0};
    status = weight_of(linear, context, tensors);
    if (!status)
      status = read_weight(linear->api, linear->op->storage, tensors, linear->rows,
                           linear->columns, &csr);
    if (!status)
      status = linear->op->active ? make_columns(linear->api, &csr, &linear->matrix)
                                  : make_matrix(linear->api, &csr, &linear->matrix);
    free_csr(&csr);
  }
  *found = linear->matrix;
  pthread_mutex_unlock(&linear->mutex);
  return status;
}

/* Few tokens: rows stay rows. */
static OrtStatus *multiply_rows(Linear *linear, OrtKernelContext *context, int64_t tokens,
                                FewTokens by, const float *x, const float *bias,
                                const float *residual, float *y, float *scratch) {
  const OrtApi *api = linear->api;
  const Weight *weight = &linear->weight;
  int64_t rows = linear->rows, y_features = 1 + rows;
  float *y_rows = scratch;
  Call sums = {0};
  if (by == BY_COLUMNS) {
    float *padded = scratch + (tokens * y_features + 15) / 16 * 16;
    TRY(sum_columns(linear, context, tokens, x, y_rows, padded));
  } else if (by == BY_SELL) {
    const Sell *sell = &weight->sell;
    pass(&sums, x, F32, 2, tokens, linear->columns);
    pass(&sums, sell->starts, I32, 1, sell->entries);
    pass(&sums, sell->outputs, I32, 1, sell->slots);
    pass(&sums, sell->columns, I64, 1, sell->stream);
    pass(&sums, sell->values, F32, 1, sell->tail);
    pass_integer(&sums, sell->k_block);
    pass_integer(&sums, sell->window / sell->rows);
  } else {
    Matrix matrix = {0};
    TRY(find_matrix(linear, context, &matrix));
    y_features = 1 + matrix.rows;
    float *padded = scratch + (tokens * y_features + 15) / 16 * 16;
    pad(padded, x, tokens, linear->columns, matrix.columns);
    pass(&sums, padded, F32, 2, tokens, matrix.columns);
    pass(&sums, matrix.values, F32, 2, matrix.rows, matrix.columns);
  }
  if (by != BY_COLUMNS) {
    pass(&sums, y_rows, F32, 2, tokens, y_features);
    TRY(run(api, context, by == BY_SELL ? sell_rows_kernel : dense_rows_kernel, &sums));
  }
  Call finish = {0};
  pass(&finish, y_rows, F32, 2, tokens, y_features);
  pass(&finish, bias, F32, 1, rows);
  pass(&finish, y, F32, 2, tokens, rows);
  TRY(run(api, context, finish_rows_kernels[linear->op->activation], &finish));
  if (residual) add(y, residual, tokens * rows);
  return NULL;
}

/* `beside`: the residual or the gate. */
static OrtStatus *check(const Linear *linear, const Tensor *x, const Tensor *bias,
                        const Tensor *beside) {
  if (x->dims < 1 || x->extent[x->dims - 1] != linear->columns)
    return fail(linear->api, ORT_INVALID_ARGUMENT, "%s: x has %lld features, the weight takes %lld",
                linear->op->name, x->dims ? (long long)x->extent[x->dims - 1] : 0LL,
                (long long)linear->columns);
  if (bias && count_of(bias, 0, bias->dims) != linear->rows)
    return fail(linear->api, ORT_INVALID_ARGUMENT, "%s: the bias has %lld elements for %lld rows",
                linear->op->name, (long long)count_of(bias, 0, bias->dims),
                (long long)linear->rows);
  bool same = !beside || beside->dims == x->dims;
  for (size_t d = 0; beside && same && d < x->dims; ++d)
    same = beside->extent[d] == (d + 1 == x->dims ? linear->rows : x->extent[d]);
  return same ? NULL
              : fail(linear->api, ORT_INVALID_ARGUMENT,
                     "%s: the %s must have the result's shape", linear->op->name,
                     linear->op->gated ? "gate" : "residual");
}

static OrtStatus *compute(void *made, OrtKernelContext *context) {
  Linear *linear = made;
  const Operator *op = linear->op;
  const OrtApi *api = linear->api;
  size_t next = 1 + weight_inputs(op->storage);
  Tensor x, bias, beside;
  TRY(input_of(api, context, 0, &x));
  if (op->bias) TRY(input_of(api, context, next++, &bias));
  if (op->residual || op->gated) TRY(input_of(api, context, next, &beside));
  TRY(check(linear, &x, op->bias ? &bias : NULL, op->residual || op->gated ? &beside : NULL));
  int64_t tokens = tokens_of(&x), extents[MAX_DIMS];
  memcpy(extents, x.extent, sizeof extents);
  extents[x.dims - 1] = linear->rows;
  float *y;
  TRY(output_of(api, context, extents, x.dims, &y));
  if (tokens == 0) return NULL;
  Weight own = {0};
  OrtStatus *status = NULL;
  if (!linear->constant) {
    Tensor tensors[3];
    status = weight_of(linear, context, tensors);
    if (!status) status = pack(linear, tensors, &own);
  }
  const Weight *weight = linear->constant ? &linear->weight : &own;
  int64_t groups = (tokens + 15) / 16, padding = dense_kernels.rows + 1;
  int64_t bias_floats = (linear->rows + 15) / 16 * 16;
  float *scratch = NULL;
  if (!status) {
    int64_t floats = bias_floats + groups * 16 * (linear->columns + linear->rows + padding);
    floats += groups * 16 * 64; /* few tokens are padded to whole vectors */
    scratch = borrow((size_t)floats);
    if (!scratch) status = out_of_memory(api);
  }
  if (!status) {
    const float *start = linear->bias;
    if (op->bias) {
      memcpy(scratch, bias.data, (size_t)linear->rows * sizeof *scratch);
      start = scratch;
    }
    const float *added = op->residual ? beside.data : NULL;
    float *rest = scratch + bias_floats;
    FewTokens by = IN_TILES;
    if (linear->constant && tokens <= few_tokens) by = few_tokens_by(weight, tokens);
    bool skips = linear->constant && tokens <= few_tokens && !weight->sparse;
    /* The matrix of an active linear lies column by column. */
    if (op->active && (skips || by == BY_MATRIX)) by = BY_COLUMNS;
    if (op->gated && skips)
      status = multiply_gated(linear, context, tokens, x.data, beside.data, start, y, rest);
    else if (by != IN_TILES)
      status = multiply_rows(linear, context, tokens, by, x.data, start, added, y, rest);
    else
      status = multiply(linear, weight, context, tokens, x.data, start, added, y, rest);
    if (op->gated && !skips)
      for (int64_t i = 0; i < tokens * linear->rows; ++i) y[i] *= ((const float *)beside.data)[i];
  }
  give_back(scratch);
  free_weight(&own);
  return status;
}

const Implementation linear_family = {create, compute, destroy};

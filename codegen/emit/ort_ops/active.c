/* ActiveLinear..., GatedLinear... on dense weights: what is zero in all tokens is not computed. */

#include <string.h>

#include "linear.h"

static int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

void pad(float *padded, const float *x, int64_t tokens, int64_t features, int64_t width) {
  memset(padded, 0, (size_t)(tokens * width) * sizeof *padded);
  for (int64_t t = 0; t < tokens; ++t)
    memcpy(padded + t * width, x + t * features, (size_t)features * sizeof *padded);
}

OrtStatus *sum_columns(Linear *linear, OrtKernelContext *context, int64_t tokens, const float *x,
                       float *y, float *scratch) {
  Matrix matrix = {0};
  TRY(find_matrix(linear, context, &matrix));
  pad(scratch, x, tokens, linear->columns, matrix.rows);
  Call sums = {0};
  pass(&sums, scratch, F32, 2, tokens, matrix.rows);
  pass(&sums, matrix.values, F32, 2, matrix.rows, matrix.columns);
  pass(&sums, y, F32, 2, tokens, 1 + linear->rows);
  return run(linear->api, context, columns_kernel, &sums);
}

OrtStatus *multiply_gated(Linear *linear, OrtKernelContext *context, int64_t tokens,
                          const float *x, const float *gate, const float *bias, float *y,
                          float *scratch) {
  Matrix matrix = {0};
  TRY(find_matrix(linear, context, &matrix));
  int64_t rows = linear->rows, width = aligned(rows);
  float *padded = scratch, *gates = padded + tokens * matrix.columns, *sums = gates + tokens * width;
  pad(padded, x, tokens, linear->columns, matrix.columns);
  pad(gates, gate, tokens, rows, width);
  Call call = {0};
  pass(&call, padded, F32, 2, tokens, matrix.columns);
  pass(&call, gates, F32, 2, tokens, width);
  pass(&call, matrix.values, F32, 2, matrix.rows, matrix.columns);
  pass(&call, bias, F32, 1, rows);
  pass(&call, sums, F32, 2, tokens, width);
  TRY(run(linear->api, context, gated_rows_kernel, &call));
  for (int64_t t = 0; t < tokens; ++t)
    memcpy(y + t * rows, sums + t * width, (size_t)rows * sizeof *y);
  return NULL;
}

/* A linear of a session, and how it is computed where zeros are skipped. */
#ifndef SPARSIFY_LINEAR_H
#define SPARSIFY_LINEAR_H

#include <pthread.h>

#include "weight.h"

typedef struct {
  const Operator *op;
  const OrtApi *api;
  int64_t rows, columns;
  bool constant; /* whether the weight was packed when the kernel was made */
  Weight weight;
  float *bias; /* aligned; zeros where there is none */
  pthread_mutex_t mutex;
  Matrix matrix; /* made by the first call of few tokens that reads no SELL */
} Linear;

/* The matrix in the order in which few tokens read it: columns first for `Active...`. */
OrtStatus *find_matrix(Linear *linear, OrtKernelContext *context, Matrix *found);

/* `x`, each token padded by zeros to `width` floats. */
void pad(float *padded, const float *x, int64_t tokens, int64_t features, int64_t width);

/* Sums of the inputs that are not zero, in `y[tokens, 1 + rows]`. */
OrtStatus *sum_columns(Linear *linear, OrtKernelContext *context, int64_t tokens, const float *x,
                       float *y, float *scratch);

/* gate * (x @ W.T + bias), only where a gate of the tokens is open. */
OrtStatus *multiply_gated(Linear *linear, OrtKernelContext *context, int64_t tokens,
                          const float *x, const float *gate, const float *bias, float *y,
                          float *scratch);

#endif

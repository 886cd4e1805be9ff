/* A weight of a linear: read from the file's canonical form, packed as kernels want it. */
#ifndef SPARSIFY_WEIGHT_H
#define SPARSIFY_WEIGHT_H

#include "library.h"

/* The nonzeros row by row, columns ascending; all in one allocation. */
typedef struct {
  int64_t rows, columns, nnz;
  int64_t *offsets; /* [rows + 1] */
  int32_t *column;  /* [nnz] */
  float *value;     /* [nnz] */
} Csr;

/* sparsify.layouts.Sell(rows, k_block, window), the same bytes. */
typedef struct {
  int64_t rows, k_block, window;
  int64_t entries, slots, stream, tail; /* numbers of elements of what follows */
  int32_t *starts, *outputs;
  uint16_t *columns;
  float *values;
} Sell;

typedef struct {
  int64_t rows, columns;
  bool sparse;
  Sell sell;
  int64_t panel_count; /* sparsify.layouts.PackedDense(rows), if not sparse */
  float *panels;
  int64_t nnz;
} Weight;

/* The matrix as few tokens read it, padded by zeros to whole units of rows and 16 columns. */
typedef struct {
  int64_t rows, columns;
  float *values;
} Matrix;

/* Reads `tensors`, those of the storage in the order of the domain's operators. */
OrtStatus *read_weight(const OrtApi *api, Storage storage, const Tensor *tensors, int64_t rows,
                       int64_t columns, Csr *made);
void free_csr(Csr *csr);

/* Whichever layout the cost model expects to be faster. */
OrtStatus *pack_weight(const OrtApi *api, const Csr *csr, Weight *made);
void free_weight(Weight *weight);

/* How so few tokens are computed fastest: in tiles like many, as rows from SELL, or as rows by
 * the matrix, or by its columns where a share of the inputs is zero. */
typedef enum { IN_TILES, BY_SELL, BY_MATRIX, BY_COLUMNS } FewTokens;
FewTokens few_tokens_by(const Weight *weight, int64_t tokens);

OrtStatus *make_matrix(const OrtApi *api, const Csr *csr, Matrix *made);
/* The same column by column, both padded to whole vectors of 16. */
OrtStatus *make_columns(const OrtApi *api, const Csr *csr, Matrix *made);

int pack_sell(const Csr *csr, int64_t rows, int64_t k_block, int64_t window, Sell *made);
void free_sell(Sell *sell);

#endif

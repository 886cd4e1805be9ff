/* Weights: from the canonical forms of a file to SELL or to dense panels. */

#include "weight.h"

#include <stdlib.h>
#include <string.h>

enum { LANES = 16, SELL_TAIL = 16 };

/* ---- reading ---- */

static float value_at(const Tensor *values, int64_t i) {
  if (values->type == ORT_FLOAT) return ((const float *)values->data)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)values->data)[i] << 16; /* bfloat16 */
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static int64_t column_at(const Tensor *columns, int64_t i) {
  switch (columns->type) {
    case ORT_UINT8: return ((const uint8_t *)columns->data)[i];
    case ORT_UINT16: return ((const uint16_t *)columns->data)[i];
    default: return ((const int32_t *)columns->data)[i];
  }
}

static bool bit_at(const uint8_t *row, int64_t column) { return row[column / 8] >> column % 8 & 1; }

static bool reserve(Csr *csr, int64_t nnz) {
  size_t offsets = (size_t)(csr->rows + 1) * sizeof *csr->offsets;
  csr->nnz = nnz;
  csr->offsets = allocate(offsets + (size_t)nnz * (sizeof *csr->column + sizeof *csr->value));
  if (!csr->offsets) return false;
  csr->column = (int32_t *)(csr->offsets + csr->rows + 1);
  csr->value = (float *)(csr->column + nnz);
  return true;
}

static OrtStatus *read_csr(const OrtApi *api, const Tensor *tensors, Csr *made) {
  const Tensor *values = &tensors[0], *columns = &tensors[1], *offsets = &tensors[2];
  const int32_t *start = offsets->data;
  int64_t nnz = count_of(values, 0, values->dims);
  bool sound = offsets->type == ORT_INT32 && count_of(offsets, 0, offsets->dims) == made->rows + 1 &&
               count_of(columns, 0, columns->dims) == nnz && start[0] == 0 &&
               start[made->rows] == nnz &&
               (columns->type == ORT_UINT8 || columns->type == ORT_UINT16 ||
                columns->type == ORT_INT32);
  for (int64_t row = 0; sound && row < made->rows; ++row) sound = start[row] <= start[row + 1];
  if (!sound)
    return fail(api, ORT_INVALID_ARGUMENT,
                "sparsify: the csr weight of a linear %lld x %lld is damaged: row_offsets must rise "
                "from 0 to the number of values and columns",
                (long long)made->rows, (long long)made->columns);
  if (!reserve(made, nnz)) return out_of_memory(api);
  int64_t kept = 0;
  for (int64_t row = 0; row < made->rows; ++row) {
    made->offsets[row] = kept;
    int64_t before = -1;
    for (int64_t i = start[row]; i < start[row + 1]; ++i) {
      int64_t column = column_at(columns, i);
      if (column <= before || column >= made->columns)
        return fail(api, ORT_INVALID_ARGUMENT,
                    "sparsify: the csr weight of a linear %lld x %lld is damaged: columns must "
                    "rise within row %lld, and %lld does not",
                    (long long)made->rows, (long long)made->columns, (long long)row,
                    (long long)column);
      before = column;
      float value = value_at(values, i);
      if (value == 0) continue;
      made->column[kept] = (int32_t)column;
      made->value[kept++] = value;
    }
  }
  made->offsets[made->rows] = made->nnz = kept;
  return NULL;
}

static OrtStatus *read_bitmap(const OrtApi *api, const Tensor *tensors, Csr *made) {
  const Tensor *bits = &tensors[0], *values = &tensors[1];
  int64_t bytes = (made->columns + 7) / 8, nnz = count_of(values, 0, values->dims), found = 0;
  bool sound = bits->type == ORT_UINT8 && count_of(bits, 0, bits->dims) == made->rows * bytes;
  for (int64_t row = 0; sound && row < made->rows; ++row)
    for (int64_t column = 0; column < made->columns; ++column)
      found += bit_at((const uint8_t *)bits->data + row * bytes, column);
  if (!sound || found != nnz)
    return fail(api, ORT_INVALID_ARGUMENT,
                "sparsify: the bitmap weight of a linear %lld x %lld is damaged: it needs %lld "
                "bytes of bits, and a value for each set bit",
                (long long)made->rows, (long long)made->columns, (long long)(made->rows * bytes));
  if (!reserve(made, nnz)) return out_of_memory(api);
  int64_t next = 0, kept = 0;
  for (int64_t row = 0; row < made->rows; ++row) {
    made->offsets[row] = kept;
    for (int64_t column = 0; column < made->columns; ++column) {
      if (!bit_at((const uint8_t *)bits->data + row * bytes, column)) continue;
      float value = value_at(values, next++);
      if (value == 0) continue;
      made->column[kept] = (int32_t)column;
      made->value[kept++] = value;
    }
  }
  made->offsets[made->rows] = made->nnz = kept;
  return NULL;
}

static OrtStatus *read_dense(const OrtApi *api, const Tensor *weight, Csr *made) {
  int64_t count = made->rows * made->columns, nnz = 0;
  if (count_of(weight, 0, weight->dims) != count)
    return fail(api, ORT_INVALID_ARGUMENT,
                "sparsify: the dense weight of a linear %lld x %lld has %lld elements",
                (long long)made->rows, (long long)made->columns,
                (long long)count_of(weight, 0, weight->dims));
  for (int64_t i = 0; i < count; ++i) nnz += value_at(weight, i) != 0;
  if (!reserve(made, nnz)) return out_of_memory(api);
  int64_t kept = 0;
  for (int64_t row = 0; row < made->rows; ++row) {
    made->offsets[row] = kept;
    for (int64_t column = 0; column < made->columns; ++column) {
      float value = value_at(weight, row * made->columns + column);
      if (value == 0) continue;
      made->column[kept] = (int32_t)column;
      made->value[kept++] = value;
    }
  }
  made->offsets[made->rows] = kept;
  return NULL;
}

OrtStatus *read_weight(const OrtApi *api, Storage storage, const Tensor *tensors, int64_t rows,
                       int64_t columns, Csr *made) {
  *made = (Csr){.rows = rows, .columns = columns};
  const Tensor *values = &tensors[storage == BITMAP ? 1 : 0];
  if (rows < 1 || columns < 1 || columns > INT32_MAX || rows > INT32_MAX)
    return fail(api, ORT_INVALID_ARGUMENT, "sparsify: a linear of %lld x %lld features",
                (long long)rows, (long long)columns);
  if (values->type != ORT_FLOAT && values->type != ORT_BFLOAT16)
    return fail(api, ORT_NOT_IMPLEMENTED,
                "sparsify: a weight of element type %d; it must be float or bfloat16",
                values->type);
  switch (storage) {
    case CSR: return read_csr(api, tensors, made);
    case BITMAP: return read_bitmap(api, tensors, made);
    default: return read_dense(api, tensors, made);
  }
}

void free_csr(Csr *csr) {
  release(csr->offsets);
  *csr = (Csr){0};
}

/* ---- packing ---- */

/* Rows of a window by their number of nonzeros, those of equal number as they come. */
typedef struct {
  int64_t count, row;
} Ranked;

static int by_count(const void *a, const void *b) {
  const Ranked *left = a, *right = b;
  if (left->count != right->count) return left->count < right->count ? -1 : 1;
  return left->row < right->row ? -1 : left->row > right->row;
}

/* The first nonzero of a row at a column or beyond. */
static int64_t seek(const Csr *csr, int64_t row, int64_t column) {
  int64_t low = csr->offsets[row], high = csr->offsets[row + 1];
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (csr->column[middle] < column) low = middle + 1;
    else high = middle;
  }
  return low;
}

/* Ranks the slots of one K block; returns the steps that its groups take. */
static int64_t rank(const Csr *csr, const Sell *sell, int64_t begin, int64_t groups,
                    Ranked *ranked) {
  int64_t slots = groups * sell->rows, steps = 0;
  for (int64_t row = 0; row < slots; ++row) {
    ranked[row] = (Ranked){INT64_MAX, row}; /* past the last row: to the end of its window */
    if (row < csr->rows)
      ranked[row].count = seek(csr, row, begin + sell->k_block) - seek(csr, row, begin);
  }
  for (int64_t first = 0; first < slots; first += sell->window) {
    int64_t left = slots - first;
    qsort(ranked + first, (size_t)(left < sell->window ? left : sell->window), sizeof *ranked,
          by_count);
  }
  for (int64_t group = 0; group < groups; ++group) {
    int64_t longest = 0;
    for (int64_t r = 0; r < sell->rows; ++r) {
      Ranked *slot = &ranked[group * sell->rows + r];
      if (slot->row >= csr->rows) slot->count = 0;
      if (slot->count > longest) longest = slot->count;
    }
    steps += longest;
  }
  return steps;
}

int pack_sell(const Csr *csr, int64_t rows, int64_t k_block, int64_t window, Sell *made) {
  int64_t groups = (csr->rows + rows - 1) / rows, blocks = (csr->columns + k_block - 1) / k_block;
  int64_t slots = groups * rows, steps = 0;
  *made = (Sell){.rows = rows, .k_block = k_block, .window = window};
  Ranked *ranked = allocate((size_t)slots * sizeof *ranked);
  if (!ranked) return -1;
  for (int64_t block = 0; block < blocks; ++block)
    steps += rank(csr, made, block * k_block, groups, ranked);
  made->entries = blocks * groups + 1;
  made->slots = blocks * slots;
  made->stream = steps * rows / 4;
  made->tail = steps * rows + SELL_TAIL;
  made->starts = allocate((size_t)made->entries * sizeof *made->starts);
  made->outputs = allocate((size_t)made->slots * sizeof *made->outputs);
  made->columns = allocate((size_t)(steps * rows) * sizeof *made->columns);
  made->values = allocate((size_t)made->tail * sizeof *made->values);
  if (steps > INT32_MAX || !made->starts || !made->outputs || !made->columns || !made->values) {
    release(ranked);
    free_sell(made);
    return -1;
  }
  memset(made->columns, 0, (size_t)(steps * rows) * sizeof *made->columns);
  memset(made->values, 0, (size_t)made->tail * sizeof *made->values);
  int64_t step = 0, entry = 0;
  made->starts[0] = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t begin = block * k_block;
    rank(csr, made, begin, groups, ranked);
    for (int64_t group = 0; group < groups; ++group, ++entry) {
      int64_t longest = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const Ranked *slot = &ranked[group * rows + r];
        bool inside = slot->row < csr->rows;
        int64_t source = inside ? seek(csr, slot->row, begin) : 0;
        for (int64_t nth = 0; nth < slot->count; ++nth) {
          int64_t at = (step + nth) * rows + r;
          made->columns[at] = (uint16_t)((csr->column[source + nth] - begin) * LANES);
          made->values[at] = csr->value[source + nth];
        }
        if (slot->count > longest) longest = slot->count;
        made->outputs[entry * rows + r] = inside ? (int32_t)slot->row : -1;
      }
      step += longest;
      made->starts[entry + 1] = (int32_t)step;
    }
  }
  release(ranked);
  return 0;
}

void free_sell(Sell *sell) {
  release(sell->starts);
  release(sell->outputs);
  release(sell->columns);
  release(sell->values);
  *sell = (Sell){0};
}

static int pack_dense(const Csr *csr, int64_t rows, Weight *made) {
  made->panel_count = (csr->rows + rows - 1) / rows;
  size_t bytes = (size_t)(made->panel_count * csr->columns * rows) * sizeof *made->panels;
  made->panels = allocate(bytes);
  if (!made->panels) return -1;
  memset(made->panels, 0, bytes);
  for (int64_t row = 0; row < csr->rows; ++row) {
    float *panel = made->panels + row / rows * csr->columns * rows + row % rows;
    for (int64_t i = csr->offsets[row]; i < csr->offsets[row + 1]; ++i)
      panel[csr->column[i] * rows] = csr->value[i];
  }
  return 0;
}

/* `parts` even parts, whole multiples of `unit`. */
static int64_t share_of(int64_t whole, int64_t parts, int64_t unit) {
  int64_t share = (whole + parts - 1) / parts;
  return (share + unit - 1) / unit * unit;
}

static int64_t blocks_of(int64_t columns) {
  return (columns + sell_widest_block - 1) / sell_widest_block;
}

/* Cycles in tiles, by SELL or by dense panels. */
static double tile_cycles(const TileCosts *costs, const Weight *weight, bool sparse) {
  if (!sparse) return (double)weight->rows * (double)weight->columns * costs->weight;
  int64_t sums = share_of(weight->rows, 1, sell_kernels.rows) * blocks_of(weight->columns);
  return (double)weight->nnz * costs->nonzero + (double)sums * costs->sum;
}

FewTokens few_tokens_by(const Weight *weight, int64_t tokens) {
  /* What the formulas leave out: to tiles and back, and a matrix that the caches do not hold. */
  enum { FEATURE_CYCLES = 8, NEAR_BYTES = 1 << 20, BYTES_PER_CYCLE = 12 };
  double count = (double)tokens, weights = (double)weight->rows * (double)weight->columns;
  double tiles = tile_cycles(&few_costs, weight, weight->sparse) +
                 (double)(weight->rows + weight->columns) * FEATURE_CYCLES;
  double matrix = weights * (row_costs.weight + count * row_costs.weight_token);
  double bytes = weights * sizeof(float);
  if (bytes > NEAR_BYTES && matrix < bytes / BYTES_PER_CYCLE) matrix = bytes / BYTES_PER_CYCLE;
  double sell = tiles + matrix;
  if (weight->sparse) {
    double groups =
        (double)(share_of(weight->rows, 1, sell_kernels.rows) / sell_kernels.rows) *
        (double)blocks_of(weight->columns);
    double features = (double)(weight->rows + weight->columns);
    /* Two to eight tokens lie in one vector. */
    sell = groups * row_costs.group +
           (double)weight->nnz * (tokens == 1 ? row_costs.nonzero_of_one : row_costs.nonzero) +
           (tokens == 1 ? 0 : features * row_costs.feature);
  }
  if (sell <= matrix && sell <= tiles) return BY_SELL;
  return matrix <= tiles ? BY_MATRIX : IN_TILES;
}

OrtStatus *pack_weight(const OrtApi *api, const Csr *csr, Weight *made) {
  *made = (Weight){.rows = csr->rows, .columns = csr->columns, .nnz = csr->nnz};
  int64_t blocks = blocks_of(csr->columns);
  made->sparse = tile_cycles(&many_costs, made, true) <= tile_cycles(&many_costs, made, false);
  int failure;
  if (made->sparse) {
    int64_t chunks = (csr->rows + sell_window_rows / 2) / sell_window_rows;
    int64_t window = share_of(csr->rows, chunks > 0 ? chunks : 1, sell_kernels.rows);
    failure = pack_sell(csr, sell_kernels.rows, share_of(csr->columns, blocks, 1), window,
                        &made->sell);
  } else {
    failure = pack_dense(csr, dense_kernels.rows, made);
  }
  return failure ? out_of_memory(api) : NULL;
}

static OrtStatus *reserve_matrix(const OrtApi *api, int64_t rows, int64_t columns, Matrix *made) {
  size_t bytes = (size_t)(rows * columns) * sizeof *made->values;
  *made = (Matrix){rows, columns, allocate(bytes)};
  if (!made->values) return out_of_memory(api);
  memset(made->values, 0, bytes);
  return NULL;
}

OrtStatus *make_matrix(const OrtApi *api, const Csr *csr, Matrix *made) {
  TRY(reserve_matrix(api, share_of(csr->rows, 1, dense_rows_unit), share_of(csr->columns, 1, LANES),
                     made));
  for (int64_t row = 0; row < csr->rows; ++row)
    for (int64_t i = csr->offsets[row]; i < csr->offsets[row + 1]; ++i)
      made->values[row * made->columns + csr->column[i]] = csr->value[i];
  return NULL;
}

OrtStatus *make_columns(const OrtApi *api, const Csr *csr, Matrix *made) {
  TRY(reserve_matrix(api, share_of(csr->columns, 1, LANES), share_of(csr->rows, 1, LANES), made));
  for (int64_t row = 0; row < csr->rows; ++row)
    for (int64_t i = csr->offsets[row]; i < csr->offsets[row + 1]; ++i)
      made->values[csr->column[i] * made->columns + row] = csr->value[i];
  return NULL;
}

void free_weight(Weight *weight) {
  free_sell(&weight->sell);
  release(weight->panels);
  weight->panels = NULL;
}

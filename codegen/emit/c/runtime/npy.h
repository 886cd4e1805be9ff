/* Reads and writes NumPy's .npy files, for the example program; little-endian, row-major. */
#ifndef NPY_H
#define NPY_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparsify.h"

static const char *const npy_types[] = {
    [SPARSIFY_FLOAT32] = "<f4", [SPARSIFY_FLOAT64] = "<f8",  [SPARSIFY_FLOAT16] = "<f2",
    [SPARSIFY_BFLOAT16] = "<V2", [SPARSIFY_INT64] = "<i8",   [SPARSIFY_INT32] = "<i4",
    [SPARSIFY_INT16] = "<i2",   [SPARSIFY_INT8] = "|i1",     [SPARSIFY_UINT8] = "|u1",
    [SPARSIFY_BOOL] = "|b1",
};

static inline void *npy_aligned(size_t alignment, size_t bytes) {
  return aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
}

static inline void *npy_read_file(const char *path, size_t alignment, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  void *data = NULL;
  long length;
  if (!file) return NULL;
  if (fseek(file, 0, SEEK_END) == 0 && (length = ftell(file)) >= 0) {
    rewind(file);
    *bytes = (size_t)length;
    data = npy_aligned(alignment, *bytes);
    if (data && fread(data, 1, *bytes, file) != *bytes) {
      free(data);
      data = NULL;
    }
  }
  fclose(file);
  return data;
}

/* Whether a header names this type. Numbers of bfloat16 are bytes without a meaning to NumPy, which
 * writes them as '<V2' from ml_dtypes, and as '|V2' when it has read them. */
static inline int npy_has_type(const char *header, const char *type) {
  const char *at = strstr(header, "'descr':");
  if (!at) return 0;
  at += strlen("'descr':");
  at += strspn(at, " ");
  return at[0] == '\'' && (at[1] == type[0] || (at[1] == '|' && type[1] == 'V')) &&
         !strncmp(at + 2, type + 1, 2) && at[4] == '\'';
}

/* NULL, or what is wrong. */
static inline const char *npy_read(const char *path, const sparsify_spec *spec,
                                   sparsify_tensor *tensor) {
  FILE *file = fopen(path, "rb");
  unsigned char start[12] = {0};
  char header[4096], *at;
  size_t length, bytes = sparsify_item_bytes(spec->dtype);
  if (!file) return "cannot be read";
  if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY", 6) != 0 || start[6] < 1 ||
      start[6] > 3 || (start[6] > 1 && fread(start + 10, 1, 2, file) != 2)) {
    fclose(file);
    return "is no .npy file of version 1 to 3";
  }
  length = start[8] | (size_t)start[9] << 8 | (size_t)start[10] << 16 | (size_t)start[11] << 24;
  if (length >= sizeof header) {
    fclose(file);
    return "has too long a header";
  }
  if (fread(header, 1, length, file) != length) {
    fclose(file);
    return "is cut short";
  }
  header[length] = 0;
  if (!npy_has_type(header, npy_types[spec->dtype]) || strstr(header, "'fortran_order': True")) {
    fclose(file);
    return "has another type than the input, or is stored by columns";
  }
  memset(tensor, 0, sizeof *tensor);
  at = strchr(header, '(');
  for (int d = 0; at && d < spec->dims; ++d) {
    at += strspn(at, "(, ");
    if (*at < '0' || *at > '9') at = NULL;
    else tensor->shape[d] = strtoll(at, &at, 10);
    if (at && tensor->shape[d] > 0 && bytes > SIZE_MAX / 2 / (size_t)tensor->shape[d]) {
      fclose(file);
      return "is larger than memory";
    }
    if (at) bytes *= (size_t)tensor->shape[d];
  }
  if (!at || at[strspn(at, "(, ")] != ')') {
    fclose(file);
    return "has another number of dimensions than the input";
  }
  tensor->bytes = bytes;
  tensor->data = npy_aligned(SPARSIFY_ALIGNMENT, bytes);
  if (!tensor->data || fread(tensor->data, 1, bytes, file) != bytes) {
    fclose(file);
    free(tensor->data);
    return "is cut short";
  }
  fclose(file);
  return NULL;
}

/* Memory for the largest output; 0, or -1 where there is none. */
static inline int npy_reserve(const sparsify_spec *spec, sparsify_tensor *tensor) {
  memset(tensor, 0, sizeof *tensor);
  tensor->bytes = sparsify_item_bytes(spec->dtype);
  for (int d = 0; d < spec->dims; ++d) tensor->bytes *= (size_t)spec->most[d];
  tensor->data = npy_aligned(SPARSIFY_ALIGNMENT, tensor->bytes);
  return tensor->data ? 0 : -1;
}

static inline const char *npy_write(const char *path, const sparsify_spec *spec,
                                    const sparsify_tensor *tensor) {
  char header[512];
  size_t bytes = sparsify_item_bytes(spec->dtype);
  int used = snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (",
                      npy_types[spec->dtype]);
  for (int d = 0; d < spec->dims; ++d) {
    used += snprintf(header + used, sizeof header - (size_t)used, "%lld,",
                     (long long)tensor->shape[d]);
    bytes *= (size_t)tensor->shape[d];
  }
  used += snprintf(header + used, sizeof header - (size_t)used, "), }");
  int padded = (10 + used + 1 + 63) / 64 * 64 - 10;
  unsigned char start[10] = "\x93NUMPY\x01";
  start[8] = (unsigned char)(padded & 255);
  start[9] = (unsigned char)(padded >> 8);
  FILE *file = fopen(path, "wb");
  if (!file) return "cannot be written";
  int good = fwrite(start, 1, 10, file) == 10 &&
             fprintf(file, "%s%*s\n", header, padded - used - 1, "") == padded &&
             fwrite(tensor->data, 1, bytes, file) == bytes;
  return fclose(file) == 0 && good ? NULL : "cannot be written";
}

#endif

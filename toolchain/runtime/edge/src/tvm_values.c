/* Arrays as TVM knows them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tvm_api.h"

/* DLPack's codes: 0 int, 1 uint, 2 float, 6 bool; in the order of tc_dtype. */
static const struct {
  uint8_t code, bits;
} codes[] = {
    {6, 8}, {0, 8}, {0, 16}, {0, 32}, {0, 64}, {1, 8}, {1, 16}, {1, 32}, {1, 64}, {2, 16}, {2, 32}, {2, 64},
};

static void free_managed(tvm_managed *managed) { free(managed->context); }

bool tcr_tvm_make(int32_t dtype, int32_t rank, const int64_t *shape, const void *data, tvm_any *result, void **memory,
                  char *text, size_t bytes) {
  const size_t head = sizeof(tvm_managed) + TC_MAX_RANK * sizeof(int64_t) + TC_ALIGNMENT;
  size_t size = 0;
  void *tensor = NULL;
  snprintf(text, bytes, "there is not enough memory for an array");
  if (rank > TC_MAX_RANK || !tcr_bytes_of(dtype, rank, shape, &size) || size > SIZE_MAX - 2 * head) return false;
  /* What TVM is told, the shape, and the values, in one piece. */
  const size_t room = head + (data == NULL ? size : 0);
  char *piece = aligned_alloc(TC_ALIGNMENT, (room / TC_ALIGNMENT + 1) * TC_ALIGNMENT);
  if (piece == NULL) return false;
  tvm_managed *managed = (tvm_managed *)(void *)piece;
  memset(managed, 0, sizeof *managed);
  managed->context = piece;
  managed->deleter = free_managed;
  managed->array.device_type = TVM_CPU;
  managed->array.rank = rank;
  managed->array.code = codes[dtype - 1].code;
  managed->array.bits = codes[dtype - 1].bits;
  managed->array.lanes = 1;
  managed->array.shape = (int64_t *)(void *)(piece + sizeof *managed);
  if (rank) memcpy(managed->array.shape, shape, (size_t)rank * sizeof *shape);
  *memory = piece + head / TC_ALIGNMENT * TC_ALIGNMENT;
  managed->array.data = data == NULL ? *memory : (void *)(uintptr_t)data;
  if (tcr_tvm_api()->tensor(managed, 0, 1, &tensor) != 0) {
    free(piece);
    tcr_tvm_reason(text, bytes);
    return false;
  }
  *result = (tvm_any){TVM_TENSOR, 0, {.object = tensor}};
  return true;
}

int32_t tcr_tvm_dtype(const tvm_array *array) {
  for (int32_t i = 0; i < (int32_t)(sizeof codes / sizeof *codes); i++)
    if (array->lanes == 1 && array->code == codes[i].code && array->bits == codes[i].bits) return i + 1;
  return 0;
}

bool tcr_tvm_is_dense(const tvm_array *array) {
  int64_t stride = 1;
  for (int32_t axis = array->rank - 1; axis >= 0; axis--) {
    if (array->strides != NULL && array->shape[axis] > 1 && array->strides[axis] != stride) return false;
    stride *= array->shape[axis];
  }
  return array->device_type == TVM_CPU;
}

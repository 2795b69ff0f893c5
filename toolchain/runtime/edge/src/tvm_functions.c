/* Functions that TVM itself has in Python alone, and that engines of its virtual machine call by name: the same as
 * toolchain/runtime/tvm_functions.py. */
#include <string.h>

#include "tvm_api.h"

static int refuse(const char *why) {
  tcr_tvm_api()->raise("RuntimeError", why);
  return -1;
}

/* The array of an argument: dense, in the processor's memory, of a dtype that bundles know. */
static const tvm_array *array_of(const tvm_any *value, int32_t *dtype) {
  if (value->type != TVM_TENSOR) return NULL;
  const tvm_array *array = &((const tvm_tensor *)value->as.object)->array;
  *dtype = tcr_tvm_dtype(array);
  return *dtype != 0 && tcr_tvm_is_dense(array) ? array : NULL;
}

static void write_indices(const tvm_array *array, int32_t dtype, int64_t count, int64_t *to) {
  const unsigned char *data = (const unsigned char *)array->data + array->offset;
  int64_t total = 1, found = 0;
  for (int32_t axis = 0; axis < array->rank; axis++) total *= array->shape[axis];
  for (int64_t i = 0; i < total && found < count; i++) {
    if (tcr_element(dtype, data, (size_t)i) == 0) continue;
    int64_t rest = i;
    for (int32_t axis = array->rank - 1; axis >= 0; axis--) {
      to[axis * count + found] = rest % array->shape[axis];
      rest /= array->shape[axis];
    }
    if (array->rank == 0) to[found] = 0;
    found++;
  }
}

/* Indices of the elements that are not 0: int64[rank, count]; a scalar is an array of one element. */
static int nonzero(void *self, const tvm_any *arguments, int32_t count, tvm_any *result) {
  int32_t dtype = 0;
  const tvm_array *array = count == 1 ? array_of(&arguments[0], &dtype) : NULL;
  char why[128];
  void *memory;
  (void)self;
  if (array == NULL) return refuse("relax.run.nonzero: takes one dense array in the processor's memory");
  const unsigned char *data = (const unsigned char *)array->data + array->offset;
  int64_t total = 1, shape[2] = {array->rank > 0 ? array->rank : 1, 0};
  for (int32_t axis = 0; axis < array->rank; axis++) total *= array->shape[axis];
  for (int64_t i = 0; i < total; i++) shape[1] += tcr_element(dtype, data, (size_t)i) != 0;
  if (!tcr_tvm_make(TC_INT64, 2, shape, NULL, result, &memory, why, sizeof why)) return refuse(why);
  write_indices(array, dtype, shape[1], memory);
  return 0;
}

/* The sizes of a shape: int64[rank]. */
static int shape_to_tensor(void *self, const tvm_any *arguments, int32_t count, tvm_any *result) {
  struct {
    const int64_t *sizes;
    size_t count;
  } shape;
  char why[128];
  void *memory;
  (void)self;
  if (count != 1 || arguments[0].type != TVM_SHAPE) return refuse("relax.run.shape_to_tensor: takes one shape");
  memcpy(&shape, (const char *)arguments[0].as.object + sizeof(tvm_object), sizeof shape);
  const int64_t rank = (int64_t)shape.count;
  if (!tcr_tvm_make(TC_INT64, 1, &rank, NULL, result, &memory, why, sizeof why)) return refuse(why);
  if (rank) memcpy(memory, shape.sizes, shape.count * sizeof *shape.sizes);
  return 0;
}

bool tcr_tvm_register(char *text, size_t bytes) {
  static const struct {
    const char *name;
    tvm_function function;
  } all[] = {{"relax.run.nonzero", nonzero}, {"relax.run.shape_to_tensor", shape_to_tensor}};
  const tvm_api *api = tcr_tvm_api();
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    const tvm_bytes name = {all[i].name, strlen(all[i].name)};
    void *function = NULL;
    const bool failed = api->make(NULL, all[i].function, NULL, &function) != 0 || api->set(&name, function, 1) != 0;
    if (failed) tcr_tvm_reason(text, bytes);
    if (function != NULL) api->release(function);
    if (failed) return false;
  }
  return true;
}

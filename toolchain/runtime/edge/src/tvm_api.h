/* The part of TVM's stable C interface (tvm/ffi/c_api.h and DLPack) that engine_vm.c calls, as its manual lays it out:
 * the libraries are opened when a bundle needs them, and nothing of theirs is needed to compile this. */
#ifndef TCR_TVM_API_H
#define TCR_TVM_API_H

#include "internal.h"

typedef struct tvm_any {
  int32_t type;
  uint32_t length; /* of a short string, whose characters are in bytes; else 0 */
  union {
    int64_t integer;
    void *object;
    const char *text;
    char bytes[8];
  } as;
} tvm_any;

/* Kinds of values; from TVM_OBJECT on they are objects whose references are counted. */
enum {
  TVM_INT = 1,
  TVM_BOOL = 2,
  TVM_TEXT = 8,
  TVM_SHORT_STRING = 11,
  TVM_OBJECT = 64,
  TVM_STRING = 65,
  TVM_FUNCTION = 68,
  TVM_SHAPE = 69,
  TVM_TENSOR = 70,
  TVM_ARRAY = 71
};
enum { TVM_CPU = 1, TVM_POOLED = 2 };

typedef struct tvm_bytes {
  const char *data;
  size_t size;
} tvm_bytes;

/* What every object begins with; its own content follows. */
typedef struct tvm_object {
  uint64_t references;
  int32_t type;
  uint32_t padding;
  void (*deleter)(void *self, int flags);
} tvm_object;

typedef struct tvm_error {
  tvm_object head;
  tvm_bytes kind, message;
} tvm_error;

typedef struct tvm_array {
  void *data;
  int32_t device_type, device_number;
  int32_t rank;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
} tvm_array;

typedef struct tvm_tensor {
  tvm_object head;
  tvm_array array;
} tvm_tensor;

/* DLManagedTensor. */
typedef struct tvm_managed {
  tvm_array array;
  void *context;
  void (*deleter)(struct tvm_managed *self);
} tvm_managed;

/* A function that engines call; it returns 0, or -1 after raising an error. */
typedef int (*tvm_function)(void *self, const tvm_any *arguments, int32_t count, tvm_any *result);

typedef struct tvm_api {
  int (*global)(const tvm_bytes *name, void **function);
  int (*call)(void *function, tvm_any *arguments, int32_t count, tvm_any *result);
  int (*release)(void *object);
  void (*error)(void **error);
  int (*tensor)(tvm_managed *from, int32_t alignment, int32_t contiguous, void **tensor);
  int (*make)(void *self, tvm_function function, void (*deleter)(void *self), void **result);
  int (*set)(const tvm_bytes *name, void *function, int replace);
  void (*raise)(const char *kind, const char *message);
} tvm_api;

/* tvm_load.c.  Functions that return false write why into text. */
int32_t tcr_tvm_load(const tcr_layout *layout, int32_t threads, tcr_problem *problem);
int32_t tcr_tvm_processors(void); /* that this process may use */
const tvm_api *tcr_tvm_api(void); /* once it is loaded */
bool tcr_tvm_global(const char *name, void **function, char *text, size_t bytes);
bool tcr_tvm_call(void *function, tvm_any *arguments, int32_t count, tvm_any *result, char *text, size_t bytes);
bool tcr_tvm_call_global(const char *name, tvm_any *arguments, int32_t count, tvm_any *result, char *text,
                         size_t bytes);
void tcr_tvm_drop(tvm_any *value);
void tcr_tvm_reason(char *text, size_t bytes); /* of what was raised last */

/* tvm_values.c.  A tensor over data, which must live as long and be aligned; NULL: in memory of its own. */
bool tcr_tvm_make(int32_t dtype, int32_t rank, const int64_t *shape, const void *data, tvm_any *result, void **memory,
                  char *text, size_t bytes);
int32_t tcr_tvm_dtype(const tvm_array *array); /* a tc_dtype; 0: one that bundles do not know */
/* Whether it is row by row without gaps in the processor's memory. */
bool tcr_tvm_is_dense(const tvm_array *array);

/* tvm_functions.c */
bool tcr_tvm_register(char *text, size_t bytes);

#endif

/* Opens bundles and runs them, with no more than a C library: the edge runtime's interface.
 *
 * Every function that can fail returns a tc_status and never ends the process, jumps or throws.  All memory that is
 * read or written is the caller's, but for strings and arrays in descriptions, which live as long as their bundle.
 * Different bundles may be used from different threads at once, and so may one bundle, with the exception of runs:
 * while one thread runs a bundle another one gets TC_BUSY, or waits where the bundle was opened with TC_FLAG_WAIT.
 * tc_close() must be the last use of a bundle.
 */
#ifndef TOOLCHAIN_RUNTIME_H
#define TOOLCHAIN_RUNTIME_H

#include "toolchain_model.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TC_API __attribute__((visibility("default")))

/* Raised whenever a struct or a meaning below changes in a way that old callers would not survive. */
#define TC_RUNTIME_ABI 1u

#define TC_MAX_RANK 8
/* A size of an output that is known after a run only. */
#define TC_UNKNOWN_SIZE INT64_MIN

typedef enum tc_status {
  TC_OK = 0,
  TC_USAGE = 1,             /* a wrong argument, no bundle at that path, no such target */
  TC_INCOMPATIBLE_HOST = 2, /* this machine cannot run the bundle, or it is made for a newer schema */
  TC_DAMAGED_BUNDLE = 3,    /* a file is missing, truncated, changed, or of another form */
  TC_BAD_INPUT = 4,         /* an input has a wrong name, dtype, shape or size */
  TC_NO_ENGINE = 5,         /* an engine of a kind that this runtime does not run */
  TC_STORAGE = 6,           /* a file cannot be read or written */
  TC_NO_MEMORY = 7,         /* the memory or the threads could not be had */
  TC_BUSY = 8,              /* another thread is running this bundle */
  TC_FAILED = 9,            /* the engine reported an error */
  TC_TOO_SMALL = 10,        /* the memory for an output is too small; its bytes now tell how many are needed */
  TC_SELF_TEST = 11,        /* outputs differ more from the recorded ones than the bundle allows */
  TC_INTERNAL = 12          /* a bug of the runtime */
} tc_status;

#define TC_FLAG_VERIFY_ALL 1u /* hash every file of the bundle, not only those that are used */
#define TC_FLAG_OPEN_ALL 2u   /* open every variant of the engine at once, not when it is first needed */
#define TC_FLAG_WAIT 4u       /* a run waits for the one in another thread */
#define TC_FLAG_DESCRIBE 8u   /* of any machine and kind of engine: nothing is loaded, and it cannot run */

/* Start from TC_OPTIONS; members are only ever added at the end, and size tells which ones the caller knows. */
typedef struct tc_options {
  uint32_t size;      /* sizeof(tc_options) */
  uint32_t abi;       /* TC_RUNTIME_ABI, compared when a bundle is opened */
  const char *target; /* which bundle of a release; NULL: the one that suits this machine best */
  int32_t threads;    /* of one run; 0: one for each processor that the process may use */
  uint32_t flags;     /* TC_FLAG_... */
  char *error;        /* receives why opening failed, may be NULL */
  size_t error_bytes; /* size of the memory at error */
  /* For tc_open_linked: the content of the bundle's selftest.npz; must live as long as the bundle. */
  const void *selftest;
  size_t selftest_bytes;
} tc_options;

#define TC_OPTIONS {sizeof(tc_options), TC_RUNTIME_ABI, NULL, 0, 0, NULL, 0, NULL, 0}

typedef struct tc_bundle tc_bundle;

/* An input or output.  shape[i] >= 0 is a size, TC_UNKNOWN_SIZE one that only a run tells, any other negative
 * number the dynamic dimension number -(shape[i] + 1). */
typedef struct tc_tensor_info {
  uint32_t size; /* sizeof(tc_tensor_info), set by the caller */
  int32_t dtype; /* a tc_dtype */
  int32_t rank;  /* at most TC_MAX_RANK */
  const char *name;
  const int64_t *shape;
} tc_tensor_info;

/* A dynamic dimension; max is INT64_MAX when there is none. */
typedef struct tc_dim_info {
  uint32_t size; /* sizeof(tc_dim_info), set by the caller */
  int32_t batch; /* 1: rows are independent, runs may be split and filled up along it */
  const char *name;
  int64_t min;
  int64_t max;
} tc_dim_info;

/* A dense, row-major array in the byte order of the machine.  Fixed within one TC_RUNTIME_ABI. */
typedef struct tc_value {
  const char *name;           /* NULL: the input or output of the same position */
  void *data;                 /* best aligned to TC_ALIGNMENT */
  size_t bytes;               /* at data; of outputs also set to what the result takes */
  int32_t dtype;              /* a tc_dtype; of outputs set */
  int32_t rank;               /* of outputs set */
  int64_t shape[TC_MAX_RANK]; /* of outputs set */
} tc_value;

/* How far one output lies from the recorded one. */
typedef struct tc_output_check {
  uint32_t size; /* sizeof(tc_output_check), set by the caller */
  int32_t passed;
  double max_abs_error;
  double cosine;
} tc_output_check;

/* The interface of the library that was loaded; compare it with TC_RUNTIME_ABI. */
TC_API uint32_t tc_runtime_abi(void);
/* The name of a status, e.g. "DAMAGED_BUNDLE", and the exit code of bundle-run for it. */
TC_API const char *tc_status_name(int32_t status);
TC_API int32_t tc_exit_code(int32_t status);

/* Opens the bundle at path: a release or a copied bundle, or PATH@target.  Nothing of it is loaded before its digests
 * and the machine were checked.  options may be NULL.  *bundle is NULL after a failure. */
TC_API int32_t tc_open(const char *path, const tc_options *options, tc_bundle **bundle);

/* Opens an engine that is linked into the executable.  bundle_json is the content of its bundle's bundle.json, or NULL:
 * then nothing is known but what the engine says itself, and the machine is not checked. */
TC_API int32_t tc_open_linked(const tc_model *model, const char *bundle_json, size_t bytes, const tc_options *options,
                              tc_bundle **bundle);

#ifdef __wasm__
/* Opens the model of a WebAssembly module, for whoever calls the module's functions instead of running it as a command:
 * the first call, once for each instance before any other.  Pointers and sizes have 32 bits; malloc and free of the
 * module give memory for arguments. */
TC_API int32_t tc_open_module(const tc_options *options, tc_bundle **bundle);
#endif

/* NULL is allowed. */
TC_API void tc_close(tc_bundle *bundle);

TC_API uint32_t tc_num_inputs(const tc_bundle *bundle);
TC_API uint32_t tc_num_outputs(const tc_bundle *bundle);
TC_API uint32_t tc_num_dims(const tc_bundle *bundle);
TC_API int32_t tc_input(const tc_bundle *bundle, uint32_t index, tc_tensor_info *info);
TC_API int32_t tc_output(const tc_bundle *bundle, uint32_t index, tc_tensor_info *info);
TC_API int32_t tc_dim_at(const tc_bundle *bundle, uint32_t index, tc_dim_info *info);

/* "name", "version", "description", "target", "precision", "backend", "form", "digest" (of the bundle's manifest);
 * NULL for any other key, "" where it is not known. */
TC_API const char *tc_property(const tc_bundle *bundle, const char *key);

/* Fills in dtype, rank, shape and bytes of every output for inputs of these shapes; no data is read or written, and
 * the inputs' data may be NULL.  A size that only a run tells is TC_UNKNOWN_SIZE, and the bytes are 0 then. */
TC_API int32_t tc_output_shapes(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
                                uint32_t num_outputs);

/* Runs the model.  Every input and output must be given, in any order if they are named.  TC_TOO_SMALL comes before the
 * run, or after it for an output of unknown size: give the bytes that are told then, and run again. */
TC_API int32_t tc_run(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
                      uint32_t num_outputs);

/* Memory inside the engine where an input of that position may be written, in place of the caller's own: it takes no
 * memory more, as the run uses it for other things once the input was read.  So it must be filled anew before each run
 * that gets it.  *bytes is its size.  NULL where the engine has no room for it, or sizes are not fixed; a caller's own
 * memory always serves as well.  Not while another thread runs the bundle. */
TC_API void *tc_input_memory(tc_bundle *bundle, uint32_t index, size_t *bytes);

/* Runs the inputs recorded in the bundle and compares the outputs.  checks: NULL, or one for each output. */
TC_API int32_t tc_self_test(tc_bundle *bundle, tc_output_check *checks, uint32_t num_checks);

/* Why the last failed call of this thread on this bundle failed, as one line and perhaps lines with details and a
 * hint; empty when none failed.  Writes at most bytes, always ends with a NUL, returns the length of the whole text. */
TC_API size_t tc_last_error(tc_bundle *bundle, char *text, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif

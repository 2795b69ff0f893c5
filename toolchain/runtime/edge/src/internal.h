/* What the parts of the runtime share; nothing here is seen outside of it. */
#ifndef TCR_INTERNAL_H
#define TCR_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "json.h"
#include "toolchain_runtime.h"

#define TCR_TEXT 1024
#define TCR_DIGEST 71 /* "sha256:" and 64 digits */
#define TCR_PATH 4096
#define TCR_MAX_ELEMENTS ((uint64_t)PTRDIFF_MAX)

/* 2^power, of -1022 to 1023.  Not ldexp: libm takes 0.3 MB of a process that needs nothing else of it. */
static inline double tcr_power_of_two(int power) {
  const uint64_t bits = (uint64_t)(1023 + power) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* A failure on its way to the caller. */
typedef struct tcr_problem {
  int32_t status;
  char text[TCR_TEXT];
} tcr_problem;

/* Sets the problem to "WHERE: WHAT" and "  hint: HINT" (both may be empty) and returns status. */
int32_t tcr_fail(tcr_problem *problem, int32_t status, const char *where, const char *hint, const char *what, ...)
    __attribute__((format(printf, 5, 6)));
int32_t tcr_damaged(tcr_problem *problem, const char *where, const char *what, ...)
    __attribute__((format(printf, 3, 4)));
int32_t tcr_no_memory(tcr_problem *problem, uint64_t bytes, const char *what);

/* Text into memory of fixed size, cut off at its end; length counts on. */
typedef struct tcr_text {
  char *at;
  size_t bytes, length;
} tcr_text;
void tcr_append(tcr_text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* hash.c */
typedef struct tcr_sha256 {
  uint32_t state[8];
  uint64_t length;
  uint8_t block[64];
  void (*blocks)(uint32_t *, const uint8_t *, size_t);
} tcr_sha256;
void tcr_sha256_start(tcr_sha256 *hash);
void tcr_sha256_add(tcr_sha256 *hash, const void *data, size_t bytes);
void tcr_sha256_end(tcr_sha256 *hash, char digest[TCR_DIGEST + 1]);
extern const uint32_t tcr_sha256_constants[64];
/* The processor's own instructions for it, or NULL. */
void (*tcr_sha256_fast(void))(uint32_t *, const uint8_t *, size_t);

/* host.c, host_wasm.c: the machine in the words of /proc/cpuinfo. */
const char *tcr_host_os(void);
const char *tcr_host_arch(void);
bool tcr_is_host_arch(const char *name);
int tcr_host_elf_machine(void);
const char *tcr_elf_machine_name(int machine);
bool tcr_host_has(const char *feature);
bool tcr_riscv_has(const char *extension); /* host_riscv.c */
void tcr_host_describe(char *text, size_t bytes);
const char *tcr_host_processor(void); /* LLVM's name, or "" */

/* files.c */
typedef struct tcr_bytes {
  unsigned char *data;
  size_t size;
} tcr_bytes;
/* The whole of a regular file of at most limit bytes, with a NUL after it; free data. */
int32_t tcr_read_file(const char *path, uint64_t limit, tcr_bytes *bytes, tcr_problem *problem);
int32_t tcr_hash_file(const char *path, const char *name, uint64_t size, const char *digest, tcr_problem *problem);

/* manifest.c: what bundle.json says. */
typedef struct tcr_tensor {
  const char *name;
  int32_t dtype, rank;
  int64_t shape[TC_MAX_RANK];
  bool has_pad;
  double pad;
  int64_t pad_integer;
  int64_t low, high; /* values of whole numbers, inclusive; INT64_MIN and INT64_MAX: any */
} tcr_tensor;

typedef struct tcr_dim {
  const char *name;
  int64_t min, max;
  bool batch;
} tcr_dim;

typedef struct tcr_contract {
  uint32_t num_inputs, num_outputs, num_dims;
  tcr_tensor *inputs, *outputs;
  tcr_dim *dims;
} tcr_contract;

typedef struct tcr_variant {
  const char *file;
  int64_t *sizes; /* for each dim of the contract; 0: dynamic */
} tcr_variant;

typedef struct tcr_manifest {
  json_document document; /* the strings below live in it */
  const char *name, *version, *description, *target, *backend, *precision, *device;
  const json_value *requirements, *profile;
  bool has_tolerance;
  double cosine, max_abs_error; /* NaN: not checked */
  tcr_contract contract;
  tcr_variant *variants;
  uint32_t num_variants;
  int64_t *sizes;
} tcr_manifest;

#define TCR_SCHEMA 1
int32_t tcr_check_schema(const json_value *data, const char *where, tcr_problem *problem);
int32_t tcr_parse_manifest(tcr_manifest *manifest, const char *text, size_t bytes, const char *where,
                           tcr_problem *problem);
int32_t tcr_parse_contract(tcr_contract *contract, const json_value *data, const char *where, tcr_problem *problem);
int32_t tcr_contract_of_model(tcr_contract *contract, const tc_model *model, tcr_problem *problem);
void tcr_free_contract(tcr_contract *contract);
void tcr_free_manifest(tcr_manifest *manifest);
/* Why this machine cannot run it: a line into text for each reason; their number.  linked: the code is here already. */
int tcr_incompatibilities(const json_value *requirements, bool linked, tcr_text *text);

const char *tcr_dtype_name(int32_t dtype);
int32_t tcr_dtype_of(const char *name); /* 0: none */
/* Bytes of an array; false when they are no size of memory. */
bool tcr_bytes_of(int32_t dtype, int32_t rank, const int64_t *shape, size_t *bytes);
void tcr_shape_text(tcr_text *text, int32_t rank, const int64_t *shape, const tcr_contract *contract);

/* layout.c */
typedef struct tcr_file {
  const char *name, *digest;
  uint64_t size;
} tcr_file;

typedef struct tcr_layout {
  char *path;
  char digest[TCR_DIGEST + 1]; /* of the bundle's manifest */
  json_document document;      /* of the bundle's manifest; the strings of files live in it */
  tcr_file config;
  tcr_file *files;
  uint32_t num_files;
} tcr_layout;

const char *tcr_annotation(const json_value *descriptor, const char *key);
/* Refuses what is no layout. */
int32_t tcr_check_layout(const char *folder, tcr_problem *problem);
int32_t tcr_read_index(const char *folder, json_document *index, tcr_problem *problem);
/* Opens the bundle that an entry of the index describes; on failure nothing is left to free. */
int32_t tcr_open_bundle(const char *folder, const json_value *descriptor, tcr_layout *layout, tcr_manifest *manifest,
                        tcr_problem *problem);
/* release.c: PATH or PATH@TARGET; target may be NULL. */
int32_t tcr_open_layout(const char *reference, const char *target, tcr_layout *layout, tcr_manifest *manifest,
                        tcr_problem *problem);
const tcr_file *tcr_find_file(const tcr_layout *layout, const char *name);
int32_t tcr_blob_path(const tcr_layout *layout, const char *digest, char path[TCR_PATH], tcr_problem *problem);
int32_t tcr_read_blob(const char *folder, const char *digest, uint64_t size, uint64_t limit, tcr_bytes *bytes,
                      tcr_problem *problem);
int32_t tcr_verify_all(const tcr_layout *layout, tcr_problem *problem);
void tcr_free_layout(tcr_layout *layout);

/* engine.c, engine_aot.c and engine_vm.c: what runs at sizes that it was compiled for. */
typedef struct tcr_engine tcr_engine;
typedef struct tcr_engine_ops {
  const char *form;
  int32_t (*open)(tcr_engine *engine, const char *path, const char *name, tcr_problem *problem);
  /* Shape of an output for these sizes of the contract's dims. */
  void (*output_shape)(const tcr_engine *engine, uint32_t output, const int64_t *sizes, int64_t *shape);
  int32_t (*run)(tcr_engine *engine, const int64_t *sizes, const void *const *inputs, void *const *outputs,
                 tcr_problem *problem);
  void (*close)(tcr_engine *engine);
  /* Memory of its own for an input of the contract, filled anew before each run; NULL where there is none. */
  void *(*input_memory)(const tcr_engine *engine, uint32_t input);
  /* An output of the last run, whose size that run told: its shape and bytes, and a copy where room is enough.  NULL:
   * all sizes are known before. */
  int32_t (*take)(const tcr_engine *engine, uint32_t output, int64_t *shape, void *to, size_t room, size_t *bytes,
                  tcr_problem *problem);
} tcr_engine_ops;

struct tcr_engine {
  const tcr_engine_ops *ops; /* NULL: not opened yet */
  const tcr_contract *contract;
  const tcr_layout *layout; /* vm: where TVM's libraries are */
  struct tcr_machine *machine;
  const int64_t *fixed;
  int32_t threads;
  const tc_model *model; /* aot: linked, or of the library */
  void *library;
  tc_instance *instance;
  uint32_t *input_of, *output_of; /* the contract's index for each of the model's */
  uint32_t *dim_of;
  int64_t *dims;
  const void **in;
  void **out;
  int64_t *effective; /* sizes that it runs at */
  void **staged;      /* arrays filled up to the fixed sizes, inputs then outputs; made when first needed */
  void **passed;      /* what it gets: those, or the caller's */
};

extern const tcr_engine_ops tcr_aot, tcr_vm;
int32_t tcr_check_library(const char *path, const char *name, tcr_problem *problem);

/* buckets.c */
#define TCR_NO_SPLIT UINT32_MAX
int32_t tcr_choose(const tcr_contract *contract, const tcr_variant *variants, uint32_t count, const int64_t *sizes,
                   uint32_t *variant, uint32_t *split, tcr_problem *problem);
void tcr_fill(const tcr_contract *contract, const tcr_tensor *spec, const int64_t *from_shape, const void *from,
              const int64_t *to_shape, void *to);
void tcr_copy_block(size_t item, int32_t rank, const int64_t *extent, const char *from, const int64_t *from_shape,
                    const int64_t *from_start, char *to, const int64_t *to_shape, const int64_t *to_start);

/* numpy.c: arrays in .npy form and archives of them. */
typedef struct tcr_array {
  int32_t dtype, rank;
  int64_t shape[TC_MAX_RANK];
  const unsigned char *data; /* inside the bytes that were parsed */
  size_t bytes;
} tcr_array;
int32_t tcr_parse_npy(const unsigned char *data, size_t bytes, const char *where, tcr_array *array,
                      tcr_problem *problem);
/* The member "NAME.npy" of an archive; array->data is NULL when there is none. */
int32_t tcr_find_npz(const unsigned char *data, size_t bytes, const char *where, const char *name, tcr_array *array,
                     tcr_problem *problem);
int32_t tcr_count_npz(const unsigned char *data, size_t bytes, const char *where, const char *prefix, uint32_t *count,
                      tcr_problem *problem);
size_t tcr_npy_header(int32_t dtype, int32_t rank, const int64_t *shape, char header[256]);
double tcr_element(int32_t dtype, const unsigned char *data, size_t index);

/* An opened bundle. */
#define TCR_ERRORS 8
typedef struct tcr_error_slot {
  bool used;
  uintptr_t thread;
  char text[TCR_TEXT];
} tcr_error_slot;

struct tc_bundle {
  tcr_layout layout;
  tcr_manifest manifest;
  const tcr_contract *contract;
  tcr_contract own_contract; /* of a linked engine without bundle.json */
  const char *form;
  bool in_layout;
  const void *selftest; /* the caller's, of a linked engine */
  size_t selftest_bytes;
  uint32_t flags;
  int32_t threads;
  tcr_engine *engines; /* one for each variant */
  const tcr_engine *ran; /* the last that did, outputs of unknown size can be taken from it */
  tcr_variant *variants;
  uint32_t num_variants;
  tcr_variant own_variant;
  int64_t *own_sizes;
  int64_t *dims;      /* sizes of the run at hand, -1 where no input has the dimension */
  const void **given; /* its inputs and outputs in the order of the contract */
  void **taken;
  pthread_mutex_t running;  /* held while a run goes on */
  pthread_mutex_t speaking; /* held while error texts are written or read */
  bool locks;
  tcr_error_slot errors[TCR_ERRORS];
  uint32_t next_error;
};

/* run.c: with the lock held.  sizes are changed meanwhile, and restored. */
int32_t tcr_engine_open(tc_bundle *bundle, uint32_t index, tcr_problem *problem);
void tcr_engine_close(tc_bundle *bundle, uint32_t index);
int32_t tcr_shape_of(tc_bundle *bundle, int64_t *sizes, uint32_t output, int64_t *shape, tcr_problem *problem);
int32_t tcr_execute(tc_bundle *bundle, int64_t *sizes, const void *const *inputs, void *const *outputs,
                    tcr_problem *problem);
/* After a run, an output of unknown size: see tcr_engine_ops. */
int32_t tcr_take(const tc_bundle *bundle, uint32_t output, int64_t *shape, void *to, size_t room, size_t *bytes,
                 tcr_problem *problem);

/* values.c: with the lock held. */
int32_t tcr_run_values(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
                       uint32_t num_outputs, bool execute, tcr_problem *problem);

/* selftest.c: with the lock held. */
int32_t tcr_self_test(tc_bundle *bundle, tc_output_check *checks, uint32_t num_checks, tcr_problem *problem);

#endif

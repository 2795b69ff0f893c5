/* ONNX Runtime through its C interface, without its headers: the wheel has the library and no headers.
 *
 *   edge_ort                                                   the peak memory of a process that does nothing
 *   edge_ort LIBRARY MODEL THREADS RUNS OUTPUT NAME=DTYPE:AxBxC...   one line of JSON
 *
 * OrtApi is a struct of function pointers that only grows at its end; the numbers below are positions in it, those of
 * version 1 of the interface (onnxruntime_c_api.h).
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "edge_fill.h"

enum {
  GET_MESSAGE = 2, CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_OPTIONS = 10, SET_LEVEL = 23, SET_THREADS = 24,
  TENSOR_OF = 49, CPU_MEMORY = 69, RELEASE_VALUE = 96
};
enum { WARNINGS = 3, ALL_OPTIMIZATIONS = 99, ARENA = 1, DEFAULT_MEMORY = 0, FLOAT32 = 1, INT64 = 7, MANY = 16 };

typedef struct {
  const void *(*get_api)(uint32_t version);
  const char *(*get_version)(void);
} api_base;

static void *const *api;

#define FUNCTION(type, number) ((type)api[number])
#define CHECK(status) check(status)

static void check(void *status) {
  if (status == NULL) return;
  fprintf(stderr, "onnxruntime: %s\n", FUNCTION(const char *(*)(const void *), GET_MESSAGE)(status));
  exit(5);
}

static double now_ms(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

static long peak_kb(void) {
  char line[256];
  long peak = 0;
  FILE *file = fopen("/proc/self/status", "re");
  while (file != NULL && peak == 0 && fgets(line, sizeof line, file) != NULL) (void)sscanf(line, "VmHWM: %ld", &peak);
  if (file != NULL) fclose(file);
  return peak;
}

/* NAME=float32:1x3x8 -> a tensor; the name is cut out of the text. */
static void *tensor_of(char *text, const void *memory_info) {
  char *dtype = strchr(text, '='), *sizes = dtype ? strchr(dtype, ':') : NULL;
  int64_t shape[8];
  size_t rank = 0, count = 1;
  if (sizes == NULL) exit(2);
  *dtype++ = 0;
  const int is_float = strncmp(dtype, "float32:", 8) == 0;
  if (!is_float && strncmp(dtype, "int64:", 6) != 0) exit(2);
  for (char *at = sizes; *at && rank < 8; rank++) {
    shape[rank] = strtoll(at + 1, &at, 10);
    count *= (size_t)shape[rank];
  }
  const size_t width = is_float ? 4 : 8;
  void *memory = malloc(count * width), *value = NULL;
  if (memory == NULL) exit(3);
  fill(memory, count, width, is_float);
  CHECK(FUNCTION(void *(*)(const void *, void *, size_t, const int64_t *, size_t, int, void **), TENSOR_OF)(
      memory_info, memory, count * width, shape, rank, is_float ? FLOAT32 : INT64, &value));
  return value;
}

static int ascending(const void *one, const void *other) {
  const double a = *(const double *)one, b = *(const double *)other;
  return (a > b) - (a < b);
}

static void *open_session(char **arguments) {
  void *env, *options, *session;
  CHECK(FUNCTION(void *(*)(int, const char *, void **), CREATE_ENV)(WARNINGS, "bench", &env));
  CHECK(FUNCTION(void *(*)(void **), CREATE_OPTIONS)(&options));
  CHECK(FUNCTION(void *(*)(void *, int), SET_LEVEL)(options, ALL_OPTIMIZATIONS));
  CHECK(FUNCTION(void *(*)(void *, int), SET_THREADS)(options, atoi(arguments[3])));
  CHECK(FUNCTION(void *(*)(void *, const char *, const void *, void **), CREATE_SESSION)(env, arguments[2], options,
                                                                                       &session));
  return session;
}

int main(int count, char **arguments) {
  if (count == 1) { /* with the parts of the C library that bundle-run and engines load */
    if (!dlopen("libpthread.so.0", RTLD_NOW)) return 4;
    return printf("{\"peak_kb\": %ld}\n", peak_kb()) < 0;
  }
  if (count < 7 || count - 6 > MANY) return 2;
  const double start = now_ms();
  void *library = dlopen(arguments[1], RTLD_NOW);
  if (library == NULL) return fprintf(stderr, "%s\n", dlerror()), 4;
  const api_base *(*base)(void) = NULL;
  void *symbol = dlsym(library, "OrtGetApiBase");
  memcpy(&base, &symbol, sizeof base);
  if (base == NULL || (api = base()->get_api(1)) == NULL) return 4;
  void *session = open_session(arguments), *memory_info;
  const double load_ms = now_ms() - start;
  CHECK(FUNCTION(void *(*)(int, int, void **), CPU_MEMORY)(ARENA, DEFAULT_MEMORY, &memory_info));
  const char *names[MANY];
  void *values[MANY];
  const size_t num_inputs = (size_t)count - 6;
  for (size_t i = 0; i < num_inputs; i++) {
    values[i] = tensor_of(arguments[6 + i], memory_info);
    names[i] = arguments[6 + i];
  }
  const int runs = atoi(arguments[4]);
  double *times = calloc((size_t)runs + 1, sizeof *times), first_ms = 0;
  if (times == NULL || runs < 1) return 3;
  for (int run = 0; run < runs; run++) {
    void *output = NULL;
    const double from = now_ms();
    CHECK(FUNCTION(void *(*)(void *, const void *, const char *const *, void *const *, size_t, const char *const *,
                             size_t, void **),
                   RUN)(session, NULL, names, values, num_inputs, (const char *const *)&arguments[5], 1, &output));
    times[run] = now_ms() - from;
    FUNCTION(void (*)(void *), RELEASE_VALUE)(output);
  }
  first_ms = times[0];
  qsort(times, (size_t)runs, sizeof *times, ascending);
  printf("{\"median_ms\": %.4f, \"load_ms\": %.4f, \"first_ms\": %.4f, \"peak_kb\": %ld}\n", times[runs / 2], load_ms,
         first_ms, peak_kb());
  fflush(stdout);
  _Exit(0); /* its objects are as they are: what is measured is over */
}

/* An engine ahead of time, by hand: scores = relu(image[batch,4] @ W[4,3]), or, where SEQUENCE is defined, the tokens
 * model of bundle_samples.py.  BATCH and SEQUENCE: sizes it takes, 0 for any. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "toolchain_model.h"

#ifndef SLOW_MS
#define SLOW_MS 0
#endif
#ifndef ARENA
#define ARENA 16
#endif
#ifndef ABI
#define ABI TC_MODEL_ABI
#endif

static const int64_t any_batch = BATCH ? BATCH : -1;
static float weight(int k, int j) { return (float)(k * 3 + j) / 7 - 0.5f; }

struct tc_instance {
  char *arena;
};

#ifdef SEQUENCE
static const int64_t tokens_shape[] = {BATCH ? BATCH : -1, SEQUENCE ? SEQUENCE : -2, 4};
static const int64_t mask_shape[] = {BATCH ? BATCH : -1, SEQUENCE ? SEQUENCE : -2};
static const int64_t states_shape[] = {BATCH ? BATCH : -1, SEQUENCE ? SEQUENCE : -2, 3};
static const int64_t pooled_shape[] = {BATCH ? BATCH : -1, 4};
static const tc_tensor inputs[] = {{"tokens", TC_FLOAT32, 3, tokens_shape}, {"mask", TC_FLOAT32, 2, mask_shape}};
static const tc_tensor outputs[] = {{"states", TC_FLOAT32, 3, states_shape}, {"pooled", TC_FLOAT32, 2, pooled_shape}};
#else
static const int64_t image_shape[] = {BATCH ? BATCH : -1, 4};
static const int64_t scores_shape[] = {BATCH ? BATCH : -1, 3};
#ifndef IMAGE
#define IMAGE TC_FLOAT32
#endif
static const tc_tensor inputs[] = {{"image", IMAGE, 2, image_shape}};
static const tc_tensor outputs[] = {{"scores", TC_FLOAT32, 2, scores_shape}};
#endif
static const tc_dim dims[] = {{"batch", 1, 64}, {"sequence", 1, 16}};

static void output_shape(uint32_t output, const int64_t *sizes, int64_t *shape) {
  for (int32_t i = 0; i < outputs[output].rank; i++)
    shape[i] = outputs[output].shape[i] < 0 ? sizes[-(outputs[output].shape[i] + 1)] : outputs[output].shape[i];
}

static uint64_t arena_bytes(const int64_t *sizes) {
  (void)sizes;
  return ARENA;
}

static int32_t open_it(int32_t threads, tc_instance **instance) {
  (void)threads;
  *instance = calloc(1, sizeof **instance);
  if (*instance == NULL) return TC_MODEL_NO_MEMORY;
  (*instance)->arena = malloc((size_t)ARENA);
  if ((*instance)->arena != NULL) return TC_MODEL_OK;
  free(*instance);
  *instance = NULL;
  return TC_MODEL_NO_MEMORY;
}

/* Arrays may lie anywhere: not every processor reads floats at odd addresses. */
static float get(const void *from, int64_t index) {
  float value;
  memcpy(&value, (const char *)from + index * 4, 4);
  return value;
}

static void put(void *to, int64_t index, float value) { memcpy((char *)to + index * 4, &value, 4); }

static float product(const void *x, int64_t row, int j) {
  float sum = 0;
  for (int k = 0; k < 4; k++) sum += get(x, row * 4 + k) * weight(k, j);
  return sum;
}

static int32_t run(tc_instance *instance, const int64_t *sizes, const void *const *in, void *const *out) {
  int64_t batch = any_batch < 0 ? sizes[0] : BATCH;
  instance->arena[0] = 1;
  nanosleep(&(struct timespec){SLOW_MS / 1000, SLOW_MS % 1000 * 1000000L}, NULL);
#ifdef FAILS
  return 77;
#endif
#ifdef POISON
  for (int64_t i = 0; i < batch; i++)
    if (get(in[0], i * 4) == POISON) return 77;
#endif
#ifdef SEQUENCE
  int64_t sequence = SEQUENCE ? SEQUENCE : sizes[BATCH ? 0 : 1];
  for (int64_t i = 0; i < batch * 4; i++) {
    float sum = 0;
    for (int64_t s = 0; s < sequence; s++)
      sum += get(in[0], (i / 4 * sequence + s) * 4 + i % 4) * get(in[1], i / 4 * sequence + s);
    put(out[1], i, sum);
  }
  for (int64_t i = 0; i < batch * sequence * 3; i++) put(out[0], i, product(in[0], i / 3, (int)(i % 3)));
#else
  for (int64_t i = 0; i < batch * 3; i++) {
    float sum = product(in[0], i / 3, (int)(i % 3));
    put(out[0], i, sum > 0 ? sum : 0);
  }
#endif
  return TC_MODEL_OK;
}

static void close_it(tc_instance *instance) {
  if (instance != NULL) free(instance->arena);
  free(instance);
}

const tc_model *toolchain_model(void) {
  static const tc_model model = {ABI,
                                 sizeof inputs / sizeof *inputs,
                                 sizeof outputs / sizeof *outputs,
#ifdef SEQUENCE
                                 (BATCH == 0) + (SEQUENCE == 0),
#else
                                 BATCH == 0,
#endif
                                 inputs,
                                 outputs,
                                 dims,
                                 0,
                                 output_shape,
                                 arena_bytes,
                                 open_it,
                                 run,
                                 close_it};
  return &model;
}

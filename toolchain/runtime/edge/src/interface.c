/* The interface of an opened bundle: describes it, guards runs and error texts with locks. */
#include <stdio.h>
#include <string.h>

#include "internal.h"

uint32_t tc_num_inputs(const tc_bundle *bundle) { return bundle == NULL ? 0 : bundle->contract->num_inputs; }
uint32_t tc_num_outputs(const tc_bundle *bundle) { return bundle == NULL ? 0 : bundle->contract->num_outputs; }
uint32_t tc_num_dims(const tc_bundle *bundle) { return bundle == NULL ? 0 : bundle->contract->num_dims; }

/* A thread's number; pthread_t may be a pointer or an integer. */
static uintptr_t this_thread(void) { return (uintptr_t)pthread_self(); }

/* Keeps the text of a failure for tc_last_error: one for each of the last few threads that failed. */
static int32_t remember(const tc_bundle *constant, const tcr_problem *problem, int32_t status) {
  tc_bundle *bundle = (tc_bundle *)(uintptr_t)constant;
  if (status == TC_OK || bundle == NULL) return status;
  pthread_mutex_lock(&bundle->speaking);
  uint32_t slot = 0;
  while (slot < TCR_ERRORS && !(bundle->errors[slot].used && bundle->errors[slot].thread == this_thread())) slot++;
  if (slot == TCR_ERRORS) slot = bundle->next_error++ % TCR_ERRORS;
  bundle->errors[slot].used = true;
  bundle->errors[slot].thread = this_thread();
  memcpy(bundle->errors[slot].text, problem->text, sizeof problem->text);
  pthread_mutex_unlock(&bundle->speaking);
  return status;
}

size_t tc_last_error(tc_bundle *bundle, char *text, size_t bytes) {
  size_t length = 0;
  if (text != NULL && bytes > 0) text[0] = 0;
  if (bundle == NULL) return 0;
  pthread_mutex_lock(&bundle->speaking);
  for (uint32_t i = 0; i < TCR_ERRORS; i++) {
    if (!bundle->errors[i].used || bundle->errors[i].thread != this_thread()) continue;
    length = strlen(bundle->errors[i].text);
    if (text != NULL && bytes > 0) snprintf(text, bytes, "%s", bundle->errors[i].text);
  }
  pthread_mutex_unlock(&bundle->speaking);
  return length;
}

static int32_t bad_index(const tc_bundle *bundle, uint32_t index, uint32_t count) {
  tcr_problem problem = {TC_OK, ""};
  tcr_fail(&problem, TC_USAGE, "arguments", "",
           "number %u is asked for, there are %u, or the size of the struct is not set", index, count);
  return remember(bundle, &problem, TC_USAGE);
}

static int32_t describe(const tc_bundle *bundle, const tcr_tensor *specs, uint32_t count, uint32_t index,
                        tc_tensor_info *info) {
  if (bundle == NULL || info == NULL || info->size < sizeof *info || index >= count)
    return bad_index(bundle, index, count);
  info->dtype = specs[index].dtype;
  info->rank = specs[index].rank;
  info->name = specs[index].name;
  info->shape = specs[index].shape;
  return TC_OK;
}

int32_t tc_input(const tc_bundle *bundle, uint32_t index, tc_tensor_info *info) {
  return describe(bundle, bundle == NULL ? NULL : bundle->contract->inputs, tc_num_inputs(bundle), index, info);
}

int32_t tc_output(const tc_bundle *bundle, uint32_t index, tc_tensor_info *info) {
  return describe(bundle, bundle == NULL ? NULL : bundle->contract->outputs, tc_num_outputs(bundle), index, info);
}

int32_t tc_dim_at(const tc_bundle *bundle, uint32_t index, tc_dim_info *info) {
  if (bundle == NULL || info == NULL || info->size < sizeof *info || index >= bundle->contract->num_dims)
    return bad_index(bundle, index, tc_num_dims(bundle));
  const tcr_dim *dim = &bundle->contract->dims[index];
  *info = (tc_dim_info){info->size, dim->batch, dim->name, dim->min, dim->max};
  return TC_OK;
}

const char *tc_property(const tc_bundle *bundle, const char *key) {
  if (bundle == NULL || key == NULL) return NULL;
  const tcr_manifest *manifest = &bundle->manifest;
  const struct {
    const char *key, *value;
  } all[] = {
      {"name", manifest->name},     {"version", manifest->version},     {"description", manifest->description},
      {"target", manifest->target}, {"precision", manifest->precision}, {"backend", manifest->backend},
      {"form", bundle->form},       {"digest", bundle->layout.digest},
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (strcmp(all[i].key, key) == 0) return all[i].value == NULL ? "" : all[i].value;
  return NULL;
}

/* Takes the bundle for this thread. */
static int32_t enter(tc_bundle *bundle, tcr_problem *problem) {
  if (bundle == NULL) return TC_USAGE;
  if (bundle->flags & TC_FLAG_DESCRIBE)
    return tcr_fail(problem, TC_USAGE, "bundle", "open it without TC_FLAG_DESCRIBE", "was opened to be described only");
  if (bundle->flags & TC_FLAG_WAIT)
    pthread_mutex_lock(&bundle->running);
  else if (pthread_mutex_trylock(&bundle->running) != 0)
    return tcr_fail(problem, TC_BUSY, "bundle", "open it once for each thread, or with TC_FLAG_WAIT",
                    "another thread is running it");
  return TC_OK;
}

/* Of one engine that is open, and for the one size that it takes: with several the caller can't know which one runs. */
void *tc_input_memory(tc_bundle *bundle, uint32_t index, size_t *bytes) {
  int64_t shape[TC_MAX_RANK];
  if (bytes != NULL) *bytes = 0;
  if (bundle == NULL || bytes == NULL || index >= bundle->contract->num_inputs || bundle->num_variants != 1) return NULL;
  const tcr_engine *engine = &bundle->engines[0];
  const tcr_tensor *spec = &bundle->contract->inputs[index];
  if (engine->ops == NULL || engine->ops->input_memory == NULL) return NULL;
  for (int32_t axis = 0; axis < spec->rank; axis++) {
    shape[axis] = spec->shape[axis] >= 0 ? spec->shape[axis] : engine->fixed[-(spec->shape[axis] + 1)];
    if (shape[axis] == 0 && spec->shape[axis] < 0) return NULL;
  }
  if (!tcr_bytes_of(spec->dtype, spec->rank, shape, bytes)) return NULL;
  void *memory = engine->ops->input_memory(engine, index);
  if (memory == NULL) *bytes = 0;
  return memory;
}

static int32_t run(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
                   uint32_t num_outputs, bool execute) {
  tcr_problem problem = {TC_OK, ""};
  int32_t status = enter(bundle, &problem);
  if (status != TC_OK) return remember(bundle, &problem, status);
  status = tcr_run_values(bundle, inputs, num_inputs, outputs, num_outputs, execute, &problem);
  pthread_mutex_unlock(&bundle->running);
  return remember(bundle, &problem, status);
}

int32_t tc_output_shapes(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
                         uint32_t num_outputs) {
  return run(bundle, inputs, num_inputs, outputs, num_outputs, false);
}

int32_t tc_run(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
               uint32_t num_outputs) {
  return run(bundle, inputs, num_inputs, outputs, num_outputs, true);
}

int32_t tc_self_test(tc_bundle *bundle, tc_output_check *checks, uint32_t num_checks) {
  tcr_problem problem = {TC_OK, ""};
  int32_t status = enter(bundle, &problem);
  if (status != TC_OK) return remember(bundle, &problem, status);
  status = tcr_self_test(bundle, checks, num_checks, &problem);
  pthread_mutex_unlock(&bundle->running);
  return remember(bundle, &problem, status);
}

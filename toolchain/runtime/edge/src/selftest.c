/* Runs the inputs recorded at the build and compares the outputs: toolchain/runtime/selftest.py in C. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define SELFTEST "selftest.npz"

typedef struct record {
  const unsigned char *data;
  size_t bytes;
  tcr_bytes file; /* where data is the bundle's own, read for this */
  tc_value *inputs, *outputs;
  tcr_array *recorded;
} record;

static int32_t find(const record *test, const char *prefix, const char *name, tcr_array *array, tcr_problem *problem) {
  char key[1100];
  if (snprintf(key, sizeof key, "%s%s", prefix, name) >= (int)sizeof key)
    return tcr_damaged(problem, SELFTEST, "a name is too long");
  int32_t status = tcr_find_npz(test->data, test->bytes, SELFTEST, key, array, problem);
  if (status == TC_BAD_INPUT) return problem->status = TC_DAMAGED_BUNDLE;
  if (status == TC_OK && array->data == NULL) return tcr_damaged(problem, SELFTEST, "does not hold %s", key);
  return status;
}

static int32_t read_record(tc_bundle *bundle, record *test, tcr_problem *problem) {
  const tcr_contract *contract = bundle->contract;
  const tcr_file *file = bundle->in_layout ? tcr_find_file(&bundle->layout, SELFTEST) : NULL;
  if (file == NULL && bundle->selftest == NULL)
    return tcr_fail(problem, TC_USAGE, SELFTEST, "", "the bundle has no self-test");
  if (!bundle->manifest.has_tolerance) return tcr_damaged(problem, SELFTEST, "no tolerance is given for the self-test");
  int32_t status = TC_OK;
  if (file != NULL)
    status = tcr_read_blob(bundle->layout.path, file->digest, file->size, file->size, &test->file, problem);
  test->data = file != NULL ? test->file.data : bundle->selftest;
  test->bytes = file != NULL ? test->file.size : bundle->selftest_bytes;
  if (status != TC_OK) return status;
  test->inputs = calloc(contract->num_inputs, sizeof *test->inputs);
  test->outputs = calloc(contract->num_outputs, sizeof *test->outputs);
  test->recorded = calloc(contract->num_outputs, sizeof *test->recorded);
  if (!test->inputs || !test->outputs || !test->recorded)
    return tcr_no_memory(problem, contract->num_inputs, "the self-test");
  for (uint32_t i = 0; i < contract->num_inputs && status == TC_OK; i++) {
    tcr_array array;
    status = find(test, "input:", contract->inputs[i].name, &array, problem);
    test->inputs[i] = (tc_value){NULL, (void *)(uintptr_t)array.data, array.bytes, array.dtype, array.rank, {0}};
    memcpy(test->inputs[i].shape, array.shape, sizeof array.shape);
  }
  for (uint32_t i = 0; i < contract->num_outputs && status == TC_OK; i++)
    status = find(test, "output:", contract->outputs[i].name, &test->recorded[i], problem);
  uint32_t count = 0;
  if (status == TC_OK) status = tcr_count_npz(test->data, test->bytes, SELFTEST, "output:", &count, problem);
  if (status == TC_OK && count != contract->num_outputs)
    status = tcr_damaged(problem, SELFTEST, "holds %u outputs, the model has %u", count, contract->num_outputs);
  return status;
}

static int32_t give_room(const tcr_contract *contract, record *test, tcr_problem *problem) {
  for (uint32_t i = 0; i < contract->num_outputs; i++) {
    free(test->outputs[i].data);
    test->outputs[i].data = malloc(test->outputs[i].bytes + 1);
    if (test->outputs[i].data == NULL) return tcr_no_memory(problem, test->outputs[i].bytes, "an output");
  }
  return TC_OK;
}

static int32_t run_record(tc_bundle *bundle, record *test, tcr_problem *problem) {
  const tcr_contract *contract = bundle->contract;
  int32_t status =
      tcr_run_values(bundle, test->inputs, contract->num_inputs, test->outputs, contract->num_outputs, false, problem);
  /* Twice where only a run tells the size of an output. */
  for (int attempt = 0; attempt < 2 && (status == TC_OK || status == TC_TOO_SMALL); attempt++) {
    status = give_room(contract, test, problem);
    if (status == TC_OK)
      status = tcr_run_values(bundle, test->inputs, contract->num_inputs, test->outputs, contract->num_outputs, true,
                              problem);
    if (status == TC_OK) break;
  }
  return status;
}

static void compare(const tc_bundle *bundle, const char *name, const tc_value *got, const tcr_array *recorded,
                    tc_output_check *check, tcr_text *text) {
  const tcr_manifest *limits = &bundle->manifest;
  check->passed = 0;
  check->max_abs_error = INFINITY;
  check->cosine = 0;
  if (got->rank != recorded->rank ||
      (got->rank && memcmp(got->shape, recorded->shape, (size_t)got->rank * sizeof *got->shape))) {
    tcr_append(text, "\n  output '%s' has shape ", name);
    tcr_shape_text(text, got->rank, got->shape, NULL);
    tcr_append(text, ", recorded is ");
    tcr_shape_text(text, recorded->rank, recorded->shape, NULL);
    return;
  }
  double error = 0, dot = 0, mine = 0, its = 0;
  for (size_t i = 0; i < got->bytes / tc_item_size(got->dtype); i++) {
    double a = tcr_element(got->dtype, got->data, i), b = tcr_element(recorded->dtype, recorded->data, i);
    double off = fabs(a - b);
    if (!(off <= error)) error = isnan(error) ? error : off; /* NaN stays */
    dot += a * b;
    mine += a * a;
    its += b * b;
  }
  double norms = __builtin_sqrt(mine) * __builtin_sqrt(its);
  check->max_abs_error = error;
  check->cosine = norms != 0 ? dot / norms : error == 0;
  check->passed = 1;
  /* Written so that NaN is a problem. */
  if (!isnan(limits->max_abs_error) && !(error <= limits->max_abs_error)) {
    tcr_append(text, "\n  output '%s': largest error %.3g, allowed %.3g", name, error, limits->max_abs_error);
    check->passed = 0;
  }
  if (!isnan(limits->cosine) && !(check->cosine >= limits->cosine)) {
    tcr_append(text, "\n  output '%s': cosine similarity %.6f, at least %.6f is needed", name, check->cosine,
               limits->cosine);
    check->passed = 0;
  }
}

int32_t tcr_self_test(tc_bundle *bundle, tc_output_check *checks, uint32_t num_checks, tcr_problem *problem) {
  const tcr_contract *contract = bundle->contract;
  record test = {NULL, 0, {NULL, 0}, NULL, NULL, NULL};
  char lines[TCR_TEXT - 128] = "";
  tcr_text text = {lines, sizeof lines, 0};
  if (checks != NULL && num_checks != contract->num_outputs)
    return tcr_fail(problem, TC_USAGE, "arguments", "", "%u checks are given, the model has %u outputs", num_checks,
                    contract->num_outputs);
  int32_t status = read_record(bundle, &test, problem);
  if (status == TC_OK) status = run_record(bundle, &test, problem);
  for (uint32_t i = 0; i < contract->num_outputs && status == TC_OK; i++) {
    tc_output_check check = {sizeof check, 0, 0, 0};
    compare(bundle, contract->outputs[i].name, &test.outputs[i], &test.recorded[i], &check, &text);
    if (checks == NULL) continue;
    if (checks[i].size < sizeof check)
      status = tcr_fail(problem, TC_USAGE, "arguments", "set it to sizeof(tc_output_check)",
                        "the size of a check is %u", checks[i].size);
    else
      checks[i] = check;
  }
  if (status == TC_OK && text.length)
    status = tcr_fail(problem, TC_SELF_TEST, bundle->manifest.target, "", "the self-test failed%s", lines);
  for (uint32_t i = 0; test.outputs != NULL && i < contract->num_outputs; i++) free(test.outputs[i].data);
  free(test.inputs);
  free(test.outputs);
  free(test.recorded);
  free(test.file.data);
  return status;
}

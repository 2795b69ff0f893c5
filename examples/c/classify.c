/* Runs a bundle on one input: classify BUNDLE [FILE of raw bytes].  Without a file the input is zeros. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "toolchain_runtime.h"

/* Bytes of one element, by tc_dtype. */
static const size_t item_bytes[] = {0, 1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8};

static int fail(tc_bundle *bundle, int32_t status) {
  char text[1024];
  tc_last_error(bundle, text, sizeof text);
  fprintf(stderr, "%s: %s\n", tc_status_name(status), text);
  return tc_exit_code(status);
}

/* Every dynamic size takes its smallest value. */
static void describe_input(tc_bundle *bundle, tc_value *value) {
  tc_tensor_info info = {.size = sizeof info};
  tc_input(bundle, 0, &info);
  printf("%s: %d dimensions\n", info.name, info.rank);
  value->dtype = info.dtype;
  value->rank = info.rank;
  value->bytes = item_bytes[info.dtype];
  for (int32_t i = 0; i < info.rank; i++) {
    tc_dim_info dim = {.size = sizeof dim};
    value->shape[i] = info.shape[i];
    if (info.shape[i] < 0 && tc_dim_at(bundle, (uint32_t)(-(info.shape[i] + 1)), &dim) == TC_OK)
      value->shape[i] = dim.min;
    value->bytes *= (size_t)value->shape[i];
  }
}

int main(int argc, char **argv) {
  char why[1024];
  tc_bundle *bundle = NULL;
  tc_options options = TC_OPTIONS;
  tc_value input, output;
  memset(&input, 0, sizeof input);
  memset(&output, 0, sizeof output);
  if (argc < 2 || tc_runtime_abi() != TC_RUNTIME_ABI) return 2;

  options.error = why;
  options.error_bytes = sizeof why;
  int32_t status = tc_open(argv[1], &options, &bundle);
  if (status != TC_OK) {
    fprintf(stderr, "%s: %s\n", tc_status_name(status), why);
    return tc_exit_code(status);
  }
  if (tc_num_inputs(bundle) != 1 || tc_num_outputs(bundle) != 1) {
    fprintf(stderr, "this example is for models with one input and one output\n");
    return 2;
  }

  describe_input(bundle, &input);
  input.data = calloc(1, input.bytes + 1);
  FILE *file = argc > 2 ? fopen(argv[2], "rb") : NULL;
  if (input.data == NULL || (argc > 2 && (file == NULL || fread(input.data, 1, input.bytes, file) != input.bytes))) {
    fprintf(stderr, "%s does not hold %zu bytes\n", argc > 2 ? argv[2] : "memory", input.bytes);
    return 41;
  }
  if (file != NULL) fclose(file);

  /* How large the output will be, then its memory, then the run. */
  status = tc_output_shapes(bundle, &input, 1, &output, 1);
  if (status != TC_OK) return fail(bundle, status);
  output.data = malloc(output.bytes + 1);
  if (output.data == NULL) return 70;
  status = tc_run(bundle, &input, 1, &output, 1);
  if (status != TC_OK) return fail(bundle, status);

  tc_tensor_info info = {.size = sizeof info};
  tc_output(bundle, 0, &info);
  printf("%s:", info.name);
  for (size_t i = 0; output.dtype == TC_FLOAT32 && i < output.bytes / sizeof(float); i++)
    printf(" %g", (double)((float *)output.data)[i]);
  printf("\n");
  free(input.data);
  free(output.data);
  tc_close(bundle);
  return 0;
}

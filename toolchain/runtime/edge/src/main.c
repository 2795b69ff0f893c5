/* bundle-run: runs, tests, measures and describes a bundle without Python. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

#ifdef TC_STATIC_MODEL
/* The model and its bundle.json are in this executable. */
extern const char toolchain_bundle_json[];
extern const size_t toolchain_bundle_json_bytes;
extern const char toolchain_selftest[];
extern const size_t toolchain_selftest_bytes;
#define BUNDLE ""
#else
#define BUNDLE " BUNDLE"
#endif

static const char usage[] =
    "usage: bundle-run info" BUNDLE
    " [--target NAME]\n"
    "       bundle-run run" BUNDLE
    " [--input NAME=FILE]... [--inputs FILE.npz] [--size DIM=N]...\n"
    "                      [--output FILE.npz|NAME=FILE.npy]... [--threads N] [--target NAME]\n"
    "       bundle-run self-test" BUNDLE
    " [--threads N] [--target NAME]\n"
    "       bundle-run bench" BUNDLE
    " [--runs N] [--warmup N] [--threads N] [--size DIM=N]... [--input ...]\n"
    "       bundle-run turns" BUNDLE
    " [--threads N] [--size DIM=N]... [--input ...]\n"
    "turns: latencies in turns with other processes; each line 'run N' of standard input is answered with N of them.\n"
    "Results are JSON on standard output. A FILE of an input is .npy, or raw bytes of the input's dtype.\n";

int cli_fail(int32_t status, const char *text) {
  fprintf(stderr, "bundle-run: %s\n", text);
  return tc_exit_code(status);
}

static bool whole(const char *text, int *number) {
  char *end;
  long value = strtol(text, &end, 10);
  *number = (int)value;
  return *text && *end == 0 && value >= 0 && value <= 1000000000;
}

static bool add(const char **list, int *count, const char *value) {
  if (*count == CLI_MANY) return false;
  list[(*count)++] = value;
  return true;
}

static bool parse(int argc, char **argv, cli_options *options) {
  int at = 1;
  *options = (cli_options){.runs = 50, .warmup = 5};
  if (argc < 2) return false;
  options->command = argv[at++];
#ifndef TC_STATIC_MODEL
  if (at >= argc || argv[at][0] == '-') return false;
  options->bundle = argv[at++];
#endif
  for (; at < argc; at += 2) {
    const char *key = argv[at], *value = at + 1 < argc ? argv[at + 1] : NULL;
    bool equals = value != NULL && strchr(value, '=') != NULL, good;
    if (value == NULL) return false;
    if (strcmp(key, "--target") == 0)
      good = (options->target = value) != NULL;
    else if (strcmp(key, "--inputs") == 0)
      good = (options->archive = value) != NULL;
    else if (strcmp(key, "--threads") == 0)
      good = whole(value, &options->threads);
    else if (strcmp(key, "--runs") == 0)
      good = whole(value, &options->runs) && options->runs > 0;
    else if (strcmp(key, "--warmup") == 0)
      good = whole(value, &options->warmup);
    else if (strcmp(key, "--input") == 0)
      good = equals && add(options->inputs, &options->num_inputs, value);
    else if (strcmp(key, "--size") == 0)
      good = equals && add(options->sizes, &options->num_sizes, value);
    else if (strcmp(key, "--output") == 0)
      good = add(options->outputs, &options->num_outputs, value);
    else
      good = false;
    if (!good) {
      fprintf(stderr, "bundle-run: %s: got '%s'\n", key, value);
      return false;
    }
  }
  return true;
}

static int32_t open_bundle(const cli_options *command, uint32_t flags, tc_bundle **bundle, char *error, size_t bytes) {
  tc_options options = TC_OPTIONS;
  options.target = command->target;
  options.threads = command->threads;
  options.flags = flags;
  options.error = error;
  options.error_bytes = bytes;
#ifdef TC_STATIC_MODEL
  options.selftest = toolchain_selftest_bytes ? toolchain_selftest : NULL;
  options.selftest_bytes = toolchain_selftest_bytes;
  return tc_open_linked(toolchain_model(), toolchain_bundle_json, toolchain_bundle_json_bytes, &options, bundle);
#else
  return tc_open(command->bundle, &options, bundle);
#endif
}

static int info(tc_bundle *bundle) {
  static const char *const keys[] = {"name",      "version", "description", "target",
                                     "precision", "backend", "form",        "digest"};
  printf("{\"runtime_abi\": %u", tc_runtime_abi());
  for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
    printf(", \"%s\": ", keys[i]);
    cli_print_string(stdout, tc_property(bundle, keys[i]));
  }
  for (int outputs = 0; outputs < 2; outputs++) {
    printf(", \"%s\": [", outputs ? "outputs" : "inputs");
    for (uint32_t i = 0; i < (outputs ? tc_num_outputs(bundle) : tc_num_inputs(bundle)); i++) {
      tc_tensor_info tensor = {.size = sizeof tensor};
      (outputs ? tc_output : tc_input)(bundle, i, &tensor);
      if (i) printf(", ");
      cli_print_tensor(stdout, bundle, &tensor);
    }
    printf("]");
  }
  printf(", \"dims\": {");
  for (uint32_t i = 0; i < tc_num_dims(bundle); i++) {
    tc_dim_info dim = {sizeof dim, 0, "", 0, 0};
    tc_dim_at(bundle, i, &dim);
    if (i) printf(", ");
    cli_print_string(stdout, dim.name);
    printf(": {\"min\": %lld, \"max\": ", (long long)dim.min);
    if (dim.max == INT64_MAX)
      printf("null");
    else
      printf("%lld", (long long)dim.max);
    printf(", \"batch\": %s}", dim.batch ? "true" : "false");
  }
  printf("}}\n");
  return 0;
}

static int32_t run(tc_bundle *bundle, const cli_options *options, cli_run *arrays, tcr_problem *problem) {
  int32_t status = cli_read_inputs(bundle, options, false, arrays, problem);
  if (status == TC_OK) status = cli_make_outputs(bundle, arrays, problem);
  if (status == TC_OK) status = cli_run_once(bundle, arrays, problem);
  if (status != TC_OK) return status;
  if (options->num_outputs > 0) return cli_write_outputs(bundle, options, arrays, problem);
  printf("{");
  for (uint32_t i = 0; i < arrays->num_outputs; i++) {
    tc_tensor_info tensor = {.size = sizeof tensor};
    tc_output(bundle, i, &tensor);
    if (i) printf(", ");
    cli_print_value(stdout, tensor.name, &arrays->outputs[i]);
  }
  printf("}\n");
  return TC_OK;
}

static int32_t self_test(tc_bundle *bundle, tcr_problem *problem) {
  uint32_t count = tc_num_outputs(bundle);
  tc_output_check *checks = calloc(count, sizeof *checks);
  if (checks == NULL) return tcr_no_memory(problem, count * sizeof *checks, "the checks");
  for (uint32_t i = 0; i < count; i++) checks[i].size = sizeof *checks;
  int32_t status = tc_self_test(bundle, checks, count);
  if (status != TC_OK) tc_last_error(bundle, problem->text, sizeof problem->text);
  if (status == TC_OK || status == TC_SELF_TEST) {
    printf("{\"passed\": %s, \"outputs\": {", status == TC_OK ? "true" : "false");
    for (uint32_t i = 0; i < count; i++) {
      tc_tensor_info tensor = {.size = sizeof tensor};
      tc_output(bundle, i, &tensor);
      if (i) printf(", ");
      cli_print_string(stdout, tensor.name);
      printf(": {\"max_abs_error\": ");
      cli_print_number(stdout, checks[i].max_abs_error);
      printf(", \"cosine\": ");
      cli_print_number(stdout, checks[i].cosine);
      printf("}");
    }
    printf("}}\n");
  }
  free(checks);
  return status;
}

int main(int argc, char **argv) {
  static cli_run arrays;
  static cli_options options;
  static tcr_problem problem;
  tc_bundle *bundle = NULL;
  double start = cli_now_ms();
  if (argc == 2 && strcmp(argv[1], "--help") == 0) return fputs(usage, stdout) < 0;
  static const char *const commands[] = {"info", "run", "self-test", "bench", "turns"};
  const int unknown = 5;
  int command = unknown;
  if (parse(argc, argv, &options))
    for (command = 0; command < unknown && strcmp(commands[command], options.command) != 0; command++) continue;
  if (command == unknown) {
    fputs(usage, stderr);
    return tc_exit_code(TC_USAGE);
  }
  int32_t status = open_bundle(&options,
                               command == 2   ? TC_FLAG_VERIFY_ALL
                               : command == 0 ? TC_FLAG_DESCRIBE
                                              : 0,
                               &bundle, problem.text, sizeof problem.text);
  if (status != TC_OK) return cli_fail(status, problem.text);
  double load_ms = cli_now_ms() - start;
  if (command == 0)
    status = info(bundle);
  else if (command == 1)
    status = run(bundle, &options, &arrays, &problem);
  else if (command == 2)
    status = self_test(bundle, &problem);
  else
    status = (command == 3 ? cli_bench : cli_turns)(bundle, &options, &arrays, load_ms, &problem);
  cli_free(&arrays);
  tc_close(bundle);
  if (status == TC_OK && fflush(stdout) != 0)
    status = tcr_fail(&problem, TC_STORAGE, "standard output", "", "cannot be written");
  return status == TC_OK ? 0 : cli_fail(status, problem.text);
}

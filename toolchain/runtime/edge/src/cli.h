/* What the parts of bundle-run share. */
#ifndef TCR_CLI_H
#define TCR_CLI_H

#include <stdio.h>

#include "internal.h"

#define CLI_MANY 256 /* inputs, outputs and options of a kind */

typedef struct cli_options {
  const char *command, *bundle, *target;
  int threads, runs, warmup;
  bool all_flags;
  const char *inputs[CLI_MANY]; /* NAME=FILE */
  const char *outputs[CLI_MANY];
  const char *sizes[CLI_MANY]; /* DIM=N */
  const char *archive;
  int num_inputs, num_outputs, num_sizes;
} cli_options;

/* The arrays of one run. */
typedef struct cli_run {
  tc_value inputs[CLI_MANY], outputs[CLI_MANY];
  uint32_t num_inputs, num_outputs;
  unsigned char *files[CLI_MANY];
  bool lent[CLI_MANY]; /* invented inputs in the engine's own memory, which a run overwrites */
  unsigned char *archive;
} cli_run;

/* Prints "bundle-run: TEXT" and returns the exit code of status. */
int cli_fail(int32_t status, const char *text);
int32_t cli_read_inputs(tc_bundle *bundle, const cli_options *options, bool invent, cli_run *run, tcr_problem *problem);
/* Writes the invented inputs anew that the last run overwrote. */
void cli_renew_inputs(cli_run *run);
int32_t cli_make_outputs(tc_bundle *bundle, cli_run *run, tcr_problem *problem);
/* Memory for outputs of the bytes that they tell now. */
int32_t cli_give_room(cli_run *run, tcr_problem *problem);
int32_t cli_write_outputs(tc_bundle *bundle, const cli_options *options, const cli_run *run, tcr_problem *problem);
void cli_free(cli_run *run);

double cli_now_ms(void);
int32_t cli_run_once(tc_bundle *bundle, cli_run *run, tcr_problem *problem);
/* Latencies of one process: of a given number of runs, or as standard input asks for them. */
int32_t cli_bench(tc_bundle *bundle, const cli_options *options, cli_run *arrays, double load_ms, tcr_problem *problem);
int32_t cli_turns(tc_bundle *bundle, const cli_options *options, cli_run *arrays, double load_ms, tcr_problem *problem);

void cli_print_string(FILE *out, const char *text);
void cli_print_number(FILE *out, double value);
void cli_print_tensor(FILE *out, tc_bundle *bundle, const tc_tensor_info *info);
void cli_print_value(FILE *out, const char *name, const tc_value *value);

#endif

/* Latencies, times to load and memory: the commands bench and turns. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef __wasm__
#include <sys/resource.h>
#endif
#include <time.h>

#include "cli.h"

double cli_now_ms(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

int32_t cli_run_once(tc_bundle *bundle, cli_run *run, tcr_problem *problem) {
  int32_t status = tc_run(bundle, run->inputs, run->num_inputs, run->outputs, run->num_outputs);
  if (status == TC_TOO_SMALL) { /* of outputs whose size only a run tells */
    status = cli_give_room(run, problem);
    if (status != TC_OK) return status;
    status = tc_run(bundle, run->inputs, run->num_inputs, run->outputs, run->num_outputs);
  }
  if (status != TC_OK) tc_last_error(bundle, problem->text, sizeof problem->text);
  return status;
}

static int ascending(const void *one, const void *other) {
  double a, b;
  memcpy(&a, one, sizeof a);
  memcpy(&b, other, sizeof b);
  return (a > b) - (a < b);
}

#ifdef __wasm__
/* A module's memory only ever grows. */
static long peak_kb(void) { return (long)__builtin_wasm_memory_size(0) * 64; }
#else
/* The largest resident set since the program began, in KiB.  Not ru_maxrss, which an exec hands down. */
static long peak_kb(void) {
  char line[256];
  long peak = 0;
  struct rusage usage;
  FILE *file = fopen("/proc/self/status", "re");
  while (file != NULL && peak == 0 && fgets(line, sizeof line, file) != NULL) (void)sscanf(line, "VmHWM: %ld", &peak);
  if (file != NULL) fclose(file);
  if (peak == 0 && getrusage(RUSAGE_SELF, &usage) == 0) peak = usage.ru_maxrss;
  return peak;
}
#endif

/* Weights and arenas of the engines that are open, for the sizes that each ran last. */
static void memory_of(const tc_bundle *bundle, uint64_t *weights, uint64_t *arenas) {
  *weights = *arenas = 0;
  for (uint32_t i = 0; i < bundle->num_variants; i++) {
    const tcr_engine *engine = &bundle->engines[i];
    if (engine->ops == NULL || engine->instance == NULL) continue;
    *weights += engine->model->weight_bytes;
    *arenas += engine->model->arena_bytes(engine->dims);
  }
}

int32_t cli_bench(tc_bundle *bundle, const cli_options *options, cli_run *arrays, double load_ms, tcr_problem *problem) {
  double first_ms = 0, *times = calloc((size_t)options->runs, sizeof *times);
  if (times == NULL) return tcr_no_memory(problem, (uint64_t)options->runs * sizeof *times, "the times");
  int32_t status = cli_read_inputs(bundle, options, true, arrays, problem);
  if (status == TC_OK) status = cli_make_outputs(bundle, arrays, problem);
  for (int i = -options->warmup - 1; i < options->runs && status == TC_OK; i++) {
    cli_renew_inputs(arrays);
    double start = cli_now_ms();
    status = cli_run_once(bundle, arrays, problem);
    double took = cli_now_ms() - start;
    if (i == -options->warmup - 1)
      first_ms = took;
    else if (i >= 0)
      times[i] = took;
  }
  if (status == TC_OK) {
    uint64_t weights, arenas;
    int count = options->runs, p95 = (count * 95 + 99) / 100 - 1;
    memory_of(bundle, &weights, &arenas);
    qsort(times, (size_t)count, sizeof *times, ascending);
    printf(
        "{\"runs\": %d, \"threads\": %d, \"median_ms\": %.4f, \"p95_ms\": %.4f, \"min_ms\": %.4f, \"load_ms\": %.4f, "
        "\"first_ms\": %.4f, \"peak_kb\": %ld, \"weight_bytes\": %llu, \"arena_bytes\": %llu}\n",
        count, options->threads, (times[(count - 1) / 2] + times[count / 2]) / 2, times[p95], times[0], load_ms,
        first_ms, peak_kb(), (unsigned long long)weights, (unsigned long long)arenas);
  }
  free(times);
  return status;
}

/* Takes turns with the processes of other engines: a machine that slows down does so for all of them.  Every answer is
 * one line of JSON: first the time to load and that of the first run, then the times of each turn, and the memory after
 * the line "end".  At the end of standard input it ends: whoever asked has gone. */
int32_t cli_turns(tc_bundle *bundle, const cli_options *options, cli_run *arrays, double load_ms, tcr_problem *problem) {
  char line[64];
  long count;
  int32_t status = cli_read_inputs(bundle, options, true, arrays, problem);
  if (status == TC_OK) status = cli_make_outputs(bundle, arrays, problem);
  double start = cli_now_ms();
  if (status == TC_OK) status = cli_run_once(bundle, arrays, problem);
  if (status != TC_OK) return status;
  printf("{\"load_ms\": %.4f, \"first_ms\": %.4f}\n", load_ms, cli_now_ms() - start);
  while (fflush(stdout) == 0 && fgets(line, sizeof line, stdin) != NULL) {
    line[strcspn(line, "\n")] = 0;
    if (strcmp(line, "end") == 0) break;
    if (sscanf(line, "run %ld", &count) != 1 || count < 1 || count > 1000000)
      return tcr_fail(problem, TC_USAGE, "standard input", "", "must be lines 'run N' and 'end', got '%s'", line);
    putchar('[');
    for (long i = 0; i < count; i++) {
      cli_renew_inputs(arrays);
      start = cli_now_ms();
      status = cli_run_once(bundle, arrays, problem);
      if (status != TC_OK) return status;
      printf("%s%.4f", i ? ", " : "", cli_now_ms() - start);
    }
    puts("]");
  }
  uint64_t weights, arenas;
  memory_of(bundle, &weights, &arenas);
  printf("{\"peak_kb\": %ld, \"weight_bytes\": %llu, \"arena_bytes\": %llu}\n", peak_kb(), (unsigned long long)weights,
         (unsigned long long)arenas);
  return TC_OK;
}

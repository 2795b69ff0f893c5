/* Threads for the kernels' parallel loops, and the few functions that compiled kernels call.
 *
 * TVM's code generator splits a parallel loop into tasks and hands them to TVMBackendParallelLaunch; the signatures
 * are those of its c_backend_api.h.  Nothing of TVM's run-time is linked.
 */
#if defined(__linux__)
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <sched.h>
#endif

#include "engine.h"

#include <stdatomic.h>
#include <stdlib.h>

#ifndef TC_NO_THREADS
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <unistd.h>
#endif

typedef struct {
  void *sync_handle;
  int32_t num_task;
} parallel_env;

typedef int (*parallel_lambda)(int task, parallel_env *env, void *data);

int TVMBackendParallelLaunch(parallel_lambda lambda, void *data, int num_task);
int TVMBackendParallelBarrier(int task, parallel_env *env);
void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t bytes, int code, int bits);
int TVMBackendFreeWorkspace(int device_type, int device_id, void *pointer);
int TVMFFIEnvModRegisterSystemLibSymbol(const char *name, void *symbol);
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);

/* Blocks of memory that a thread's kernels work in: for the caller's thread in the arena, where sizes are static; else
 * a freed one is kept for the next kernel, so that after the first run nothing is allocated. */
#define SLOTS 8

typedef struct {
  void *memory;
  void *start; /* aligned */
  uint64_t bytes;
  int used;
} slot;

typedef struct {
  slot slots[SLOTS];
  /* What the plan sets aside in the arena for the kernel that runs: a stack. */
  uint8_t *planned[SLOTS + 1]; /* where each block begins, and the first free byte */
  int blocks;
  int freed[SLOTS];
  uint8_t *planned_end;
} workspace;

struct tc_threads {
  int32_t count; /* with the caller's */
  workspace *workspaces;
#ifndef TC_NO_THREADS
  pthread_t *handles;
  int32_t started;
  pthread_mutex_t mutex;
  sem_t wake;   /* not a condition variable: of those, glibc on x86 has two that differ, told apart by versions alone */
  int sleeping; /* threads that wait for wake and were not woken yet; guarded by mutex */
  atomic_uint generation; /* raised for every launch and to stop */
  atomic_int stop;
  /* The launch: its number, how many tasks it has and which is next to take, in one word.  Whoever takes a task by
   * exchanging the word knows that the launch is not over, and so that lambda and data are this launch's. */
  _Atomic uint64_t ticket;
  parallel_lambda lambda;
  void *data;
  atomic_int done; /* tasks finished */
  atomic_int failed;
#endif
};

#ifdef TC_NO_THREADS
#define TC_THREAD_LOCAL
#else
#define TC_THREAD_LOCAL _Thread_local
#endif

static TC_THREAD_LOCAL tc_threads *current;
static TC_THREAD_LOCAL workspace *scratch;

static void free_workspaces(tc_threads *threads) {
  if (threads->workspaces == NULL) return;
  for (int32_t i = 0; i < threads->count; i++)
    for (int j = 0; j < SLOTS; j++) free(threads->workspaces[i].slots[j].memory);
  free(threads->workspaces);
}

void tc_threads_use(tc_threads *threads) {
  /* A kernel that failed half-way has freed nothing. */
  for (int32_t i = 0; threads != NULL && i < threads->count; i++)
    for (int j = 0; j < SLOTS; j++) threads->workspaces[i].slots[j].used = 0;
  current = threads;
  scratch = threads == NULL ? NULL : &threads->workspaces[0];
  if (scratch != NULL) tc_threads_workspace(NULL, 0);
}

void tc_threads_workspace(void *memory, uint64_t bytes) {
  scratch->planned[0] = memory;
  scratch->planned_end = (uint8_t *)memory + bytes;
  scratch->blocks = 0;
}

static void *planned_block(uint64_t bytes) {
  uint8_t *const at = scratch->planned[scratch->blocks];
  const uint64_t taken = (bytes + (TC_ALIGNMENT - 1)) & ~(uint64_t)(TC_ALIGNMENT - 1);
  if (at == NULL || scratch->blocks == SLOTS || taken > (uint64_t)(scratch->planned_end - at)) return NULL;
  scratch->freed[scratch->blocks++] = 0;
  scratch->planned[scratch->blocks] = at + taken;
  return at;
}

static int free_planned(const void *pointer) {
  int block = scratch->blocks - 1;
  while (block >= 0 && scratch->planned[block] != pointer) block--;
  if (block < 0) return 0;
  scratch->freed[block] = 1;
  while (scratch->blocks > 0 && scratch->freed[scratch->blocks - 1]) scratch->blocks--;
  return 1;
}

#ifndef TC_NO_THREADS

/* How often a thread looks for work before it sleeps: some ten microseconds.  Kernels follow each other faster than
 * a sleeping thread wakes, and longer spinning would take the processor from others. */
#define SPINS 4000

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__arm__) && __ARM_ARCH >= 7)
  __asm__ __volatile__("yield");
#endif
}

#define MAX_TASKS 0xffff

static uint64_t ticket_of(unsigned generation, int32_t tasks) {
  return (uint64_t)generation << 32 | (uint64_t)(uint32_t)tasks << 16;
}

static void take_tasks(tc_threads *threads) {
  uint64_t ticket = atomic_load_explicit(&threads->ticket, memory_order_acquire);
  for (;;) {
    const int tasks = (int)(ticket >> 16 & MAX_TASKS), task = (int)(ticket & MAX_TASKS);
    if (task >= tasks) return;
    if (!atomic_compare_exchange_weak_explicit(&threads->ticket, &ticket, ticket + 1, memory_order_acq_rel,
                                               memory_order_acquire))
      continue;
    parallel_env env = {NULL, tasks};
    if (threads->lambda(task, &env, threads->data)) atomic_store(&threads->failed, 1);
    atomic_fetch_add_explicit(&threads->done, 1, memory_order_release);
    ticket = atomic_load_explicit(&threads->ticket, memory_order_acquire);
  }
}

/* The next generation after seen: spins, then sleeps. */
static unsigned await_launch(tc_threads *threads, unsigned seen) {
  for (int spin = 0; spin < SPINS; spin++) {
    const unsigned now = atomic_load_explicit(&threads->generation, memory_order_acquire);
    if (now != seen) return now;
    relax();
  }
  pthread_mutex_lock(&threads->mutex);
  const int sleep = atomic_load(&threads->generation) == seen;
  threads->sleeping += sleep;
  pthread_mutex_unlock(&threads->mutex);
  while (sleep && sem_wait(&threads->wake) != 0 && errno == EINTR) continue;
  return atomic_load(&threads->generation);
}

typedef struct {
  tc_threads *threads;
  workspace *workspace;
} start_argument;

static void *serve(void *argument) {
  const start_argument start = *(start_argument *)argument;
  free(argument);
  scratch = start.workspace;
  unsigned seen = 0;
  for (;;) {
    seen = await_launch(start.threads, seen);
    if (atomic_load(&start.threads->stop)) return NULL;
    take_tasks(start.threads);
  }
}

static void announce(tc_threads *threads) {
  pthread_mutex_lock(&threads->mutex);
  atomic_fetch_add(&threads->generation, 1);
  int sleeping = threads->sleeping;
  threads->sleeping = 0;
  pthread_mutex_unlock(&threads->mutex);
  for (; sleeping > 0; sleeping--) sem_post(&threads->wake);
}

static int32_t processors(void) {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const long count = sysconf(_SC_NPROCESSORS_ONLN);
  return count > 0 ? (int32_t)count : 1;
}

static int start_thread(tc_threads *threads, int32_t index) {
  start_argument *argument = malloc(sizeof *argument);
  if (argument == NULL) return 1;
  argument->threads = threads;
  argument->workspace = &threads->workspaces[index + 1];
  if (pthread_create(&threads->handles[index], NULL, serve, argument) == 0) return 0;
  free(argument);
  return 1;
}

tc_threads *tc_threads_start(int32_t count) {
  tc_threads *threads = calloc(1, sizeof *threads);
  if (threads == NULL) return NULL;
  threads->count = count > 0 ? count : processors();
  pthread_mutex_init(&threads->mutex, NULL);
  sem_init(&threads->wake, 0, 0);
  threads->workspaces = calloc((size_t)threads->count, sizeof *threads->workspaces);
  threads->handles = calloc((size_t)threads->count, sizeof *threads->handles);
  int failed = threads->workspaces == NULL || threads->handles == NULL;
  while (!failed && threads->started < threads->count - 1) {
    failed = start_thread(threads, threads->started);
    threads->started += !failed;
  }
  if (!failed) return threads;
  tc_threads_stop(threads);
  return NULL;
}

void tc_threads_stop(tc_threads *threads) {
  if (threads == NULL) return;
  atomic_store(&threads->stop, 1);
  announce(threads);
  for (int32_t i = 0; i < threads->started; i++) pthread_join(threads->handles[i], NULL);
  pthread_mutex_destroy(&threads->mutex);
  sem_destroy(&threads->wake);
  free_workspaces(threads);
  free(threads->handles);
  free(threads);
}

int TVMBackendParallelLaunch(parallel_lambda lambda, void *data, int num_task) {
  tc_threads *threads = current;
  if (threads == NULL || threads->count == 1) { /* one thread, or a parallel loop inside another */
    parallel_env env = {NULL, num_task > 0 ? num_task : 1};
    for (int task = 0; task < env.num_task; task++)
      if (lambda(task, &env, data)) return -1;
    return 0;
  }
  const int32_t tasks = num_task > 0 ? num_task : threads->count;
  if (tasks > MAX_TASKS) return -1;
  threads->lambda = lambda;
  threads->data = data;
  atomic_store_explicit(&threads->done, 0, memory_order_relaxed);
  atomic_store_explicit(&threads->failed, 0, memory_order_relaxed);
  const unsigned number = atomic_load_explicit(&threads->generation, memory_order_relaxed) + 1;
  atomic_store_explicit(&threads->ticket, ticket_of(number, tasks), memory_order_release);
  announce(threads);
  current = NULL;
  take_tasks(threads);
  current = threads;
  for (int spin = 0; atomic_load_explicit(&threads->done, memory_order_acquire) < tasks; spin++) {
    if (spin < SPINS) relax();
    else sched_yield();
  }
  return atomic_load(&threads->failed) ? -1 : 0;
}

#else

tc_threads *tc_threads_start(int32_t count) {
  (void)count;
  tc_threads *threads = calloc(1, sizeof *threads);
  if (threads == NULL) return NULL;
  threads->count = 1;
  threads->workspaces = calloc(1, sizeof *threads->workspaces);
  if (threads->workspaces != NULL) return threads;
  free(threads);
  return NULL;
}

void tc_threads_stop(tc_threads *threads) {
  if (threads == NULL) return;
  free_workspaces(threads);
  free(threads);
}

int TVMBackendParallelLaunch(parallel_lambda lambda, void *data, int num_task) {
  parallel_env env = {NULL, num_task > 0 ? num_task : 1};
  for (int task = 0; task < env.num_task; task++)
    if (lambda(task, &env, data)) return -1;
  return 0;
}

#endif

/* A barrier between tasks needs as many threads as tasks, which nothing here promises; no schedule of ours asks. */
int TVMBackendParallelBarrier(int task, parallel_env *env) {
  (void)task;
  return env->num_task == 1 ? 0 : -1;
}

void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  if (scratch == NULL || bytes > SIZE_MAX - TC_ALIGNMENT) return NULL;
  void *const planned = planned_block(bytes);
  if (planned != NULL) return planned;
  slot *best = NULL;
  for (int i = 0; i < SLOTS; i++) { /* the smallest free one that is large enough, else the largest free one */
    slot *each = &scratch->slots[i];
    if (each->used) continue;
    const int fits = each->bytes >= bytes;
    if (best == NULL || (fits && (best->bytes < bytes || each->bytes < best->bytes)) ||
        (!fits && best->bytes < bytes && each->bytes > best->bytes))
      best = each;
  }
  if (best == NULL) return NULL;
  if (best->memory == NULL || best->bytes < bytes) {
    free(best->memory);
    best->bytes = 0;
    best->memory = malloc((size_t)bytes + TC_ALIGNMENT);
    if (best->memory == NULL) return NULL;
    best->start = tc_aligned(best->memory);
    best->bytes = bytes;
  }
  best->used = 1;
  return best->start;
}

int TVMBackendFreeWorkspace(int device_type, int device_id, void *pointer) {
  (void)device_type, (void)device_id;
  if (scratch != NULL && free_planned(pointer)) return 0;
  for (int i = 0; scratch != NULL && i < SLOTS; i++)
    if (scratch->slots[i].used && scratch->slots[i].start == pointer) {
      scratch->slots[i].used = 0;
      return 0;
    }
  return -1;
}

/* A library's start-up code offers its functions to TVM's registry; here nobody looks there. */
int TVMFFIEnvModRegisterSystemLibSymbol(const char *name, void *symbol) {
  (void)name, (void)symbol;
  return 0;
}

/* A kernel's failed assertion; it returns -1 as well, which the plan passes on. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  (void)kind, (void)parts, (void)count;
}

/* The machine in the names of Linux's /proc/cpuinfo, asked of the processor or the kernel itself: under an emulator
 * that file may be that of another machine. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>

#include "internal.h"

#if defined(__x86_64__)
#define ARCH "x86_64"
#define MACHINE 62
#elif defined(__aarch64__)
#define ARCH "aarch64"
#define MACHINE 183
#elif defined(__arm__)
#define ARCH "armv7l"
#define MACHINE 40
#elif defined(__riscv) && __riscv_xlen == 64
#define ARCH "riscv64"
#define MACHINE 243
#else
#error "this architecture has no host checks yet: add its name, its ELF machine and its features"
#endif

const char *tcr_host_os(void) { return "linux"; }
const char *tcr_host_arch(void) { return ARCH; }

bool tcr_is_host_arch(const char *name) {
#if defined(__arm__)
  /* uname's name depends on the kernel: armv7l, or armv8l on a 64-bit one. */
  if (strncmp(name, "armv7", 5) == 0 || strcmp(name, "arm") == 0) return true;
#endif
  return strcmp(name, ARCH) == 0;
}

int tcr_host_elf_machine(void) { return MACHINE; }

const char *tcr_elf_machine_name(int machine) {
  switch (machine) {
    case 3: return "x86 (32-bit)";
    case 40: return "armv7l";
    case 62: return "x86_64";
    case 183: return "aarch64";
    case 243: return "riscv64";
    default: return "an unknown architecture";
  }
}

#if defined(__x86_64__)
#include <cpuid.h>

/* Where CPUID tells of a feature (Intel SDM volume 2, AMD APM volume 3): L1 is leaf 1, L7 leaf 7, L71 leaf 7
 * sub-leaf 1, X leaf 0x80000001, D1 leaf 13 sub-leaf 1.  Vectors also need the kernel to save their registers. */
enum { L1C, L1D, L7B, L7C, L7D, L71A, XC, XD, D1A, REGISTERS };
enum { ANY, YMM, ZMM, AMX };

static const struct {
  char name[20];
  uint8_t from, bit, state;
} features[] = {
    {"pni", L1C, 0, ANY},
    {"pclmulqdq", L1C, 1, ANY},
    {"ssse3", L1C, 9, ANY},
    {"fma", L1C, 12, YMM},
    {"cx16", L1C, 13, ANY},
    {"sse4_1", L1C, 19, ANY},
    {"sse4_2", L1C, 20, ANY},
    {"movbe", L1C, 22, ANY},
    {"popcnt", L1C, 23, ANY},
    {"aes", L1C, 25, ANY},
    {"xsave", L1C, 26, ANY},
    {"avx", L1C, 28, YMM},
    {"f16c", L1C, 29, YMM},
    {"rdrand", L1C, 30, ANY},
    {"cx8", L1D, 8, ANY},
    {"cmov", L1D, 15, ANY},
    {"mmx", L1D, 23, ANY},
    {"fxsr", L1D, 24, ANY},
    {"sse", L1D, 25, ANY},
    {"sse2", L1D, 26, ANY},
    {"fsgsbase", L7B, 0, ANY},
    {"bmi1", L7B, 3, ANY},
    {"avx2", L7B, 5, YMM},
    {"bmi2", L7B, 8, ANY},
    {"erms", L7B, 9, ANY},
    {"avx512f", L7B, 16, ZMM},
    {"avx512dq", L7B, 17, ZMM},
    {"rdseed", L7B, 18, ANY},
    {"adx", L7B, 19, ANY},
    {"avx512ifma", L7B, 21, ZMM},
    {"avx512cd", L7B, 28, ZMM},
    {"sha_ni", L7B, 29, ANY},
    {"avx512bw", L7B, 30, ZMM},
    {"avx512vl", L7B, 31, ZMM},
    {"avx512vbmi", L7C, 1, ZMM},
    {"avx512_vbmi2", L7C, 6, ZMM},
    {"gfni", L7C, 8, ANY},
    {"vaes", L7C, 9, YMM},
    {"vpclmulqdq", L7C, 10, YMM},
    {"avx512_vnni", L7C, 11, ZMM},
    {"avx512_bitalg", L7C, 12, ZMM},
    {"avx512_vpopcntdq", L7C, 14, ZMM},
    {"movdiri", L7C, 27, ANY},
    {"movdir64b", L7C, 28, ANY},
    {"fsrm", L7D, 4, ANY},
    {"avx512_vp2intersect", L7D, 8, ZMM},
    {"amx_bf16", L7D, 22, AMX},
    {"avx512_fp16", L7D, 23, ZMM},
    {"amx_tile", L7D, 24, AMX},
    {"amx_int8", L7D, 25, AMX},
    {"avx_vnni", L71A, 4, YMM},
    {"avx512_bf16", L71A, 5, ZMM},
    {"amx_fp16", L71A, 21, AMX},
    {"lahf_lm", XC, 0, ANY},
    {"abm", XC, 5, ANY},
    {"sse4a", XC, 6, ANY},
    {"xop", XC, 11, YMM},
    {"fma4", XC, 16, YMM},
    {"tbm", XC, 21, ANY},
    {"syscall", XD, 11, ANY},
    {"nx", XD, 20, ANY},
    {"lm", XD, 29, ANY},
    {"xsaveopt", D1A, 0, ANY},
    {"xsavec", D1A, 1, ANY},
};

/* Read once: under a hypervisor each CPUID takes microseconds or more. */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static uint32_t registers[REGISTERS], saved;

static void read_registers(void) {
  uint32_t *r = registers, high;
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d)) r[L1C] = c, r[L1D] = d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    r[L7B] = b, r[L7C] = c, r[L7D] = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) r[L71A] = a;
  }
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) r[XC] = c, r[XD] = d;
  if (__get_cpuid_count(13, 1, &a, &b, &c, &d)) r[D1A] = a;
  if (r[L1C] >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
}

bool tcr_host_has(const char *feature) {
  /* What XCR0 must hold: XMM and YMM, masks and ZMM, tiles. */
  static const uint32_t needed[] = {0, 6, 0xe6, 0x60000};
  pthread_once(&once, read_registers);
  for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
    uint32_t state = needed[features[i].state];
    if (strcmp(features[i].name, feature) == 0)
      return (registers[features[i].from] >> features[i].bit & 1) && (saved & state) == state;
  }
  return false;
}

void tcr_host_describe(char *text, size_t bytes) {
  unsigned brand[12], a, b, c, d;
  if (__get_cpuid_max(0x80000000, NULL) >= 0x80000004) {
    for (unsigned i = 0; i < 3; i++) {
      __cpuid(0x80000002 + i, a, b, c, d);
      brand[4 * i] = a, brand[4 * i + 1] = b, brand[4 * i + 2] = c, brand[4 * i + 3] = d;
    }
    snprintf(text, bytes, "%.48s", (const char *)brand);
    size_t length = strlen(text);
    while (length && text[length - 1] == ' ') text[--length] = 0;
    if (length) return;
  }
  snprintf(text, bytes, "%s", ARCH);
}

/* Of toolchain/target_detect.py, which names its source. */
static const struct {
  uint8_t model;
  const char *name;
} intel[] = {
    {0x3c, "haswell"},        {0x3f, "haswell"},       {0x45, "haswell"},        {0x46, "haswell"},
    {0x3d, "broadwell"},      {0x47, "broadwell"},     {0x4f, "broadwell"},      {0x56, "broadwell"},
    {0x4e, "skylake"},        {0x5e, "skylake"},       {0x8e, "skylake"},        {0x9e, "skylake"},
    {0xa5, "skylake"},        {0xa6, "skylake"},       {0xa7, "rocketlake"},     {0x7d, "icelake-client"},
    {0x7e, "icelake-client"}, {0x8c, "tigerlake"},     {0x8d, "tigerlake"},      {0x97, "alderlake"},
    {0x9a, "alderlake"},      {0xbf, "alderlake"},     {0xb7, "raptorlake"},     {0xba, "raptorlake"},
    {0xaa, "meteorlake"},     {0xac, "meteorlake"},    {0x6a, "icelake-server"}, {0x6c, "icelake-server"},
    {0x8f, "sapphirerapids"}, {0xcf, "emeraldrapids"}, {0xad, "graniterapids"},  {0xae, "graniterapids-d"},
    {0xaf, "sierraforest"},
};

static const char *amd(unsigned family, unsigned model) {
  if (family == 23) return model >= 0x30 ? "znver2" : "znver1";
  if (family == 25) return (model >= 0x10 && model <= 0x1f) || (model >= 0x60 && model <= 0xaf) ? "znver4" : "znver3";
  return family == 26 ? "znver5" : "";
}

const char *tcr_host_processor(void) {
  unsigned a, b, c, d, vendor[3];
  __cpuid(0, a, vendor[0], vendor[2], vendor[1]);
  if (!__get_cpuid(1, &a, &b, &c, &d)) return "";
  unsigned family = a >> 8 & 15, model = a >> 4 & 15;
  if (family == 15) family += a >> 20 & 255;
  if (family == 6 || family >= 15) model |= a >> 12 & 0xf0;
  if (memcmp(vendor, "AuthenticAMD", 12) == 0) return amd(family, model);
  if (memcmp(vendor, "GenuineIntel", 12) != 0 || family != 6) return "";
  if (model == 0x55)
    return tcr_host_has("avx512_bf16") ? "cooperlake" : tcr_host_has("avx512_vnni") ? "cascadelake" : "skylake-avx512";
  for (size_t i = 0; i < sizeof intel / sizeof *intel; i++)
    if (intel[i].model == model) return intel[i].name;
  return "";
}

#else /* not x86 */

#if defined(__aarch64__)
/* Names in the order of the bits of AT_HWCAP and AT_HWCAP2 (Linux, arch/arm64/include/uapi/asm/hwcap.h). */
static const char first[] =
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 "
    "sm4 "
    "asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg ";
static const char second[] =
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 "
    "dgh "
    "rng bti mte ecv afp rpres mte3 sme smei16i64 smef64f64 smei8i32 smef16f32 smeb16f32 smef32f32 smefa64 wfxt ebf16 "
    "sveebf16 cssc rprfm sve2p1 sme2 sme2p1 smei16i32 smebi32i32 smeb16b16 smef16f16 mops hbc sveb16b16 lrcpc3 lse128 ";
#elif defined(__arm__)
static const char first[] =
    "swp half thumb 26bit fastmult fpa vfp edsp java iwmmxt crunch thumbee neon vfpv3 vfpv3d16 tls vfpv4 idiva idivt "
    "vfpd32 lpae evtstrm fphp asimdhp asimddp asimdfhm asimdbf16 i8mm ";
static const char second[] = "aes pmull sha1 sha2 crc32 sb ssbs ";
#else /* riscv: a bit for each letter */
static const char first[] = "a b c d e f g h i j k l m n o p q r s t u v w x y z ";
static const char second[] = "";
#endif

static int bit_of(const char *names, const char *feature) {
  size_t length = strlen(feature);
  for (int bit = 0; *names; bit++) {
    const char *space = strchr(names, ' ');
    if ((size_t)(space - names) == length && memcmp(names, feature, length) == 0) return bit;
    names = space + 1;
  }
  return -1;
}

/* auxv entries are words of 64 bits on 64-bit machines and of 32 on others; no name of those lies past their end. */
static bool has_bit(unsigned long type, int bit) { return bit >= 0 && (getauxval(type) >> bit & 1); }

bool tcr_host_has(const char *feature) {
#if defined(__riscv)
  if (strlen(feature) > 1) return tcr_riscv_has(feature);
#endif
  return has_bit(AT_HWCAP, bit_of(first, feature)) || has_bit(AT_HWCAP2, bit_of(second, feature));
}

#if defined(__aarch64__)
/* Implementer and part of the last core: of unlike cores the last are the big ones, by the custom of device trees. */
static unsigned long processor_id(void) {
  char line[256];
  unsigned long implementer = 0, part = 0, value = 0;
  FILE *file = fopen("/proc/cpuinfo", "re");
  while (file != NULL && fgets(line, sizeof line, file) != NULL) {
    if (sscanf(line, "CPU implementer : %lx", &value) == 1) implementer = value;
    if (sscanf(line, "CPU part : %lx", &value) == 1) part = value;
  }
  if (file != NULL) fclose(file);
  if (implementer == 0 && tcr_host_has("cpuid")) { /* the kernel emulates reading MIDR_EL1 */
    __asm__("mrs %0, midr_el1" : "=r"(value));
    implementer = value >> 24 & 255;
    part = value >> 4 & 0xfff;
  }
  return implementer << 12 | part;
}

static const struct {
  uint32_t id;
  const char *name;
} arm[] = {
    {0x41d03, "cortex-a53"},  {0x41d04, "cortex-a35"},  {0x41d05, "cortex-a55"},  {0x41d07, "cortex-a57"},
    {0x41d08, "cortex-a72"},  {0x41d09, "cortex-a73"},  {0x41d0a, "cortex-a75"},  {0x41d0b, "cortex-a76"},
    {0x41d0d, "cortex-a77"},  {0x41d41, "cortex-a78"},  {0x41d44, "cortex-x1"},   {0x41d46, "cortex-a510"},
    {0x41d47, "cortex-a710"}, {0x41d48, "cortex-x2"},   {0x41d4d, "cortex-a715"}, {0x41d4e, "cortex-x3"},
    {0x41d80, "cortex-a520"}, {0x41d81, "cortex-a720"}, {0x41d82, "cortex-x4"},   {0x41d0c, "neoverse-n1"},
    {0x41d49, "neoverse-n2"}, {0x41d8e, "neoverse-n3"}, {0x41d40, "neoverse-v1"}, {0x41d4f, "neoverse-v2"},
    {0x41d84, "neoverse-v3"}, {0xc0ac3, "ampere1"},     {0xc0ac4, "ampere1a"},    {0x46001, "a64fx"},
    {0x48d01, "tsv110"},
};

const char *tcr_host_processor(void) {
  unsigned long id = processor_id();
  for (size_t i = 0; i < sizeof arm / sizeof *arm; i++)
    if (arm[i].id == id) return arm[i].name;
  return "";
}
#else
const char *tcr_host_processor(void) { return ""; }
#endif

void tcr_host_describe(char *text, size_t bytes) {
  const char *name = tcr_host_processor();
  snprintf(text, bytes, "%s", *name ? name : ARCH);
}
#endif

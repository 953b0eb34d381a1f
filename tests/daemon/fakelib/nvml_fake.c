/* A small libnvidia-ml.so.1 that the real pynvml loads: emulated GPUs of constant power, and faults on demand.
 *
 * The counter is power x CLOCK_MONOTONIC, floored to 100 ms, so that every process sees the same one and a killed daemon
 * finds it where it ought to be. The ring holds 119 samples of 20 ms whose stamps (us since 1970) end their slots.
 *
 * ENERGYD_FAKE_NVML_GPUS      how many GPUs (default 1, at most 8)
 * ENERGYD_FAKE_NVML_POWER_MW  power of GPU 0 (default 300000); GPU i draws 50 W more than GPU i-1
 * ENERGYD_FAKE_NVML_CONTROL   a file read at every call, with lines
 *     fail FUNCTION CODE [GPU]   this call (with or without version suffix as it is exported) returns CODE
 *     set KEY NUMBER             KEY: value_type, mig, pid, reset_ns (monotonic ns at which the counter began), gpus
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_GPUS 8
#define RING 119
#define SLOT_US 20000ULL
#define STEP_NS 100000000ULL
enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

typedef struct { int index; } gpu_t;
typedef gpu_t *handle_t;
typedef union { double d; unsigned int ui; unsigned long ul; unsigned long long ull; long long sll; int si; unsigned short us; } value_t;
typedef struct { unsigned long long time_us; value_t value; } sample_t;
typedef struct { unsigned int pid; unsigned long long memory; unsigned int gpu_instance, compute_instance; } process_t;

static gpu_t gpus[MAX_GPUS] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
static int sessions;

static unsigned long long now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (unsigned long long)t.tv_sec * 1000000000ULL + (unsigned long long)t.tv_nsec;
}

static long long number(const char *variable, long long otherwise) {
    const char *text = getenv(variable);
    return text && *text ? atoll(text) : otherwise;
}

/* The last control line `word name VALUE [GPU]` that fits, else `otherwise`. gpu < 0: of no GPU in particular. */
static long long control(const char *word, const char *name, int gpu, long long otherwise) {
    const char *path = getenv("ENERGYD_FAKE_NVML_CONTROL");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256], what[32], which[128];
    long long value;
    int only;
    if (!file) return otherwise;
    while (fgets(line, sizeof line, file)) {
        int fields = sscanf(line, "%31s %127s %lld %d", what, which, &value, &only);
        if (fields < 3 || strcmp(what, word) || strcmp(which, name)) continue;
        if (fields == 3 || only == gpu) otherwise = value;
    }
    fclose(file);
    return otherwise;
}

static int gpu_count(void) {
    long long n = control("set", "gpus", -1, number("ENERGYD_FAKE_NVML_GPUS", 1));
    return n < 0 ? 0 : n > MAX_GPUS ? MAX_GPUS : (int)n;
}

static unsigned long long power_mw(handle_t gpu) {
    return (unsigned long long)number("ENERGYD_FAKE_NVML_POWER_MW", 300000) + 50000ULL * (unsigned long long)gpu->index;
}

/* What every call does first: injected faults, then what a driver without a session answers. */
#define ENTER(gpu_index)                                                   \
    do {                                                                   \
        int fault_ = (int)control("fail", __func__, (gpu_index), OK);      \
        if (fault_) return fault_;                                         \
        if (!sessions) return UNINITIALIZED;                               \
    } while (0)

static int copied(char *to, unsigned int length, const char *text) {
    if (strlen(text) + 1 > length) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return OK;
}

EXPORT int nvmlInitWithFlags(unsigned int flags) {
    int fault = (int)control("fail", __func__, -1, OK);
    (void)flags;
    if (fault) return fault;
    sessions++;
    return OK;
}

EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

EXPORT int nvmlShutdown(void) {
    ENTER(-1);
    sessions--;
    return OK;
}

EXPORT const char *nvmlErrorString(int code) {
    switch (code) {
        case OK: return "Success";
        case UNINITIALIZED: return "Uninitialized";
        case 3: return "Not Supported";
        case 4: return "Insufficient Permissions";
        case NOT_FOUND: return "Not Found";
        case 9: return "Driver Not Loaded";
        case 15: return "GPU is lost";
        case 18: return "Driver/library version mismatch";
        case 999: return "Unknown Error";
        default: return "Emulated error";
    }
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    ENTER(-1);
    return copied(version, length, "0.0-emulated");
}

EXPORT int nvmlDeviceGetCount_v2(unsigned int *count) {
    ENTER(-1);
    *count = (unsigned int)gpu_count();
    return OK;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned int index, handle_t *gpu) {
    ENTER((int)index);
    if ((int)index >= gpu_count()) return INVALID_ARGUMENT;
    *gpu = &gpus[index];
    return OK;
}

static void uuid_of(int index, char *to) { sprintf(to, "GPU-EMU-00000000-0000-0000-0000-%012d", index); }

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, handle_t *gpu) {
    char mine[64];
    ENTER(-1);
    for (int i = 0; i < gpu_count(); i++) {
        uuid_of(i, mine);
        if (strcmp(uuid, mine)) continue;
        *gpu = &gpus[i];
        return (int)control("fail", __func__, i, OK);
    }
    return NOT_FOUND;
}

EXPORT int nvmlDeviceGetUUID(handle_t gpu, char *uuid, unsigned int length) {
    char mine[64];
    ENTER(gpu->index);
    uuid_of(gpu->index, mine);
    return copied(uuid, length, mine);
}

EXPORT int nvmlDeviceGetName(handle_t gpu, char *name, unsigned int length) {
    ENTER(gpu->index);
    return copied(name, length, "energyd emulated GPU");
}

EXPORT int nvmlDeviceGetPowerUsage(handle_t gpu, unsigned int *mw) {
    ENTER(gpu->index);
    *mw = (unsigned int)power_mw(gpu);
    return OK;
}

EXPORT int nvmlDeviceGetEnforcedPowerLimit(handle_t gpu, unsigned int *mw) {
    ENTER(gpu->index);
    *mw = 700000;
    return OK;
}

EXPORT int nvmlDeviceGetPowerManagementLimit(handle_t gpu, unsigned int *mw) {
    ENTER(gpu->index);
    *mw = 650000;
    return OK;
}

EXPORT int nvmlDeviceGetMigMode(handle_t gpu, unsigned int *current, unsigned int *pending) {
    ENTER(gpu->index);
    *current = *pending = (unsigned int)control("set", "mig", gpu->index, 0);
    return OK;
}

EXPORT int nvmlDeviceGetPersistenceMode(handle_t gpu, unsigned int *mode) {
    ENTER(gpu->index);
    *mode = 1;
    return OK;
}

EXPORT int nvmlDeviceGetTotalEnergyConsumption(handle_t gpu, unsigned long long *mj) {
    unsigned long long ns, began_ns;
    ENTER(gpu->index);
    began_ns = (unsigned long long)control("set", "reset_ns", gpu->index, 0);
    ns = now_ns(CLOCK_MONOTONIC);
    ns = (ns > began_ns ? ns - began_ns : 0) / STEP_NS * STEP_NS;
    *mj = (unsigned long long)((double)power_mw(gpu) * ((double)ns / 1e9));
    return OK;
}

static void fill(value_t *value, long long type, unsigned long long mw) {
    memset(value, 0, sizeof *value);
    switch (type) {
        case 0: value->d = (double)mw; break;
        case 2: value->ul = (unsigned long)mw; break;
        case 3: value->ull = mw; break;
        case 4: value->sll = (long long)mw; break;
        case 5: value->si = (int)mw; break;
        case 6: value->us = (unsigned short)mw; break;
        default: value->ui = (unsigned int)mw;
    }
}

EXPORT int nvmlDeviceGetSamples(handle_t gpu, int what, unsigned long long after_us, unsigned int *type,
                                unsigned int *count, sample_t *samples) {
    unsigned long long last_us = now_ns(CLOCK_REALTIME) / 1000 / SLOT_US * SLOT_US;
    unsigned int room = *count, n = 0;
    ENTER(gpu->index);
    if (what != 0) return INVALID_ARGUMENT;
    *type = (unsigned int)control("set", "value_type", gpu->index, 1);
    *count = RING;
    if (!samples) return OK;
    for (unsigned long long k = RING; k-- > 0 && n < room;) {
        if (last_us - k * SLOT_US <= after_us) continue;
        samples[n].time_us = last_us - k * SLOT_US;
        fill(&samples[n++].value, *type, power_mw(gpu));
    }
    *count = n;
    return n ? OK : NOT_FOUND;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(handle_t gpu, unsigned int *count, process_t *processes) {
    unsigned int room = *count, pid;
    ENTER(gpu->index);
    pid = (unsigned int)control("set", "pid", gpu->index, 0);
    *count = pid ? 1 : 0;
    if (!pid) return OK;
    if (!processes || !room) return INSUFFICIENT_SIZE;
    memset(processes, 0, sizeof *processes);
    processes->pid = pid;
    return OK;
}

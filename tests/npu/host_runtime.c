// SPDX-License-Identifier: Apache-2.0
/* The part of Ascend's runtime that torch_npu needs to start: devices, contexts, streams, events and memory, all on the host and
 * all synchronous. No operator exists. NPU_STUB_COUNT says how many devices there are. Names and arguments are those of CANN's acl
 * headers; statuses are its numbers for "success", "not initialised", "invalid argument" and "out of memory". */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, NOT_INITIALISED = 500000, INVALID = 107000, NO_CONTEXT = 107002, NO_MEMORY = 207001, DEVICES = 64 };

static __thread int32_t current = -1;
static char contexts[DEVICES];

static int devices(void) {
    const char *count = getenv("NPU_STUB_COUNT");
    return count ? atoi(count) : 0;
}

/* process and devices */
int aclInit(const char *config) { return devices() ? SUCCESS : NOT_INITIALISED; }
int aclFinalize(void) { return SUCCESS; }
const char *aclGetRecentErrMsg(void) { return NULL; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)devices(); return SUCCESS; }
int aclrtGetDevice(int32_t *device) {
    if (current < 0) return NO_CONTEXT;
    *device = current;
    return SUCCESS;
}
int aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= devices()) return INVALID;
    current = device;
    return SUCCESS;
}
int aclrtResetDevice(int32_t device) { return SUCCESS; }
int aclrtGetCurrentContext(void **context) {
    *context = current < 0 ? NULL : &contexts[current];
    return current < 0 ? NO_CONTEXT : SUCCESS;
}
int aclrtSetCurrentContext(void *context) { current = (int32_t)((char *)context - contexts); return SUCCESS; }
int aclrtSynchronizeDevice(void) { return SUCCESS; }
int aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) { return SUCCESS; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 1; return SUCCESS; }
int aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) { return SUCCESS; }
int aclrtDeviceGetBareTgid(int32_t *process) { *process = 0; return SUCCESS; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = 0; return SUCCESS; }

/* streams and events: what is asked for is done when the call returns */
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { *stream = calloc(1, 64); return SUCCESS; }
int aclrtCreateStream(void **stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }
int aclrtDestroyStream(void *stream) { free(stream); return SUCCESS; }
int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }
int aclrtSynchronizeStream(void *stream) { return SUCCESS; }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds) { return SUCCESS; }
int aclrtStreamWaitEvent(void *stream, void *event) { return SUCCESS; }
int aclrtStreamQuery(void *stream, int32_t *status) { *status = 1; return SUCCESS; }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = 0; return SUCCESS; }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { *event = calloc(1, sizeof(struct timespec)); return SUCCESS; }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return aclrtCreateEventExWithFlag(event, flags); }
int aclrtDestroyEvent(void *event) { free(event); return SUCCESS; }
int aclrtRecordEvent(void *event, void *stream) { clock_gettime(CLOCK_MONOTONIC, event); return SUCCESS; }
int aclrtResetEvent(void *event, void *stream) { return SUCCESS; }
int aclrtSynchronizeEvent(void *event) { return SUCCESS; }
int aclrtQueryEventStatus(void *event, int32_t *status) { *status = 1; return SUCCESS; }
int aclrtQueryEventWaitStatus(void *event, int32_t *status) { *status = 1; return SUCCESS; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    struct timespec *a = start, *b = end;
    *milliseconds = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) * 1e-6f;
    return SUCCESS;
}

/* memory */
int aclrtMalloc(void **address, size_t size, int policy) {
    *address = aligned_alloc(512, (size + 511) / 512 * 512);
    return *address ? SUCCESS : NO_MEMORY;
}
int aclrtMallocAlign32(void **address, size_t size, int policy) { return aclrtMalloc(address, size, policy); }
int aclrtMallocHost(void **address, size_t size) { return aclrtMalloc(address, size, 0); }
int aclrtFree(void *address) { free(address); return SUCCESS; }
int aclrtFreeHost(void *address) { return aclrtFree(address); }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
    if (size > room) return INVALID;
    memcpy(to, from, size);
    return SUCCESS;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, size, kind);
}
int aclrtMemset(void *to, size_t room, int32_t value, size_t size) {
    if (size > room) return INVALID;
    memset(to, value, size);
    return SUCCESS;
}
int aclrtGetMemInfo(int kind, size_t *left, size_t *all) { *left = (size_t)60 << 30; *all = (size_t)64 << 30; return SUCCESS; }

/* looked up by name while torch_npu starts; each has nothing to do here */
int aclrtProcessReport(int32_t timeout) { return SUCCESS; }
int aclrtSetDeviceSatMode(int mode) { return SUCCESS; }
int aclrtGetDeviceSatMode(int *mode) { *mode = 1; return SUCCESS; }
int aclrtGetOverflowStatus(void *out, size_t size, void *stream) { return SUCCESS; }
int aclrtResetOverflowStatus(void *stream) { return SUCCESS; }
int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return SUCCESS; }
int aclrtSetOpWaitTimeout(uint32_t seconds) { return SUCCESS; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return SUCCESS; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return SUCCESS; }
int aclrtSetSysParamOpt(int option, int64_t value) { return SUCCESS; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return SUCCESS; }
int aclrtPeekAtLastError(int level) { return SUCCESS; }
int aclrtGetLastError(int level) { return SUCCESS; }
int aclSetCompileopt(int option, const char *value) { return SUCCESS; }
size_t aclGetCompileoptSize(int option) { return 256; }
int aclGetCompileopt(int option, char *value, size_t size) { if (size) value[0] = 0; return SUCCESS; }
int aclopSetCompileFlag(int flag) { return SUCCESS; }
int aclGenGraphAndDumpForOp(void) { return NOT_INITIALISED; }

// A CUDA driver without a GPU, for tests/device.rs: memory is the host's, and whatever may be late is as late as is legal:
// a queued copy happens when somebody waits for it. Two kernels are known: `gather` of kernels/rows.cu, and
// `copy_box`, in clusters of two and begun early, which copies the first box of one tensor map to that of another.
//
// FAKE_CUDA holds words like `version=12040 count=2 capability=90 memory=1000000 fault=gather init=100`.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace {
using Work = std::function<void()>;
struct Event { size_t position; };
struct Graph { std::vector<Work> works; };

std::vector<Work> queue;    // what was queued
size_t done = 0;            // of it, carried out
bool capturing = false;
Graph recorded;
int broken = 0;             // sticky, reported to whoever waits
size_t used = 0;            // bytes of device memory
thread_local void* current = nullptr;

std::string setting(const char* name, const char* otherwise) {
    const char* all = std::getenv("FAKE_CUDA");
    std::string text = std::string(" ") + (all ? all : ""), key = std::string(" ") + name + "=";
    size_t at = text.find(key);
    if (at == std::string::npos) return otherwise;
    at += key.size();
    return text.substr(at, text.find(' ', at) - at);
}
size_t number(const char* name, const char* otherwise) { return std::strtoull(setting(name, otherwise).c_str(), nullptr, 10); }

int submit(Work work) {
    if (!current) return 201;
    if (broken) return broken;
    if (capturing) recorded.works.push_back(work);
    else queue.push_back(work);
    return 0;
}
int wait(size_t position) {
    if (!current) return 201;
    if (capturing) return 900;
    while (done < position && !broken) queue[done++]();
    return broken;
}
}  // namespace

extern "C" {
int cuInit(unsigned) { return (int)number("init", "0"); }
int cuDriverGetVersion(int* version) { *version = (int)number("version", "13000"); return 0; }
int cuGetErrorName(int error, const char** name) {
    *name = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_OTHER";
    return 0;
}
int cuGetErrorString(int, const char** text) { *text = "as the fake says"; return 0; }
int cuDeviceGetCount(int* count) { *count = (int)number("count", "1"); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int size, int) { std::strncpy(name, "Fake", size); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = number("memory", "1073741824"); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    int capability = (int)number("capability", "90");
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 97 ? 232448 : 132;
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &queue; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuStreamCreate(void** stream, unsigned) { *stream = &done; return current ? 0 : 201; }
int cuStreamDestroy_v2(void*) { return 0; }
int cuStreamSynchronize(void*) { return wait(queue.size()); }
int cuStreamBeginCapture_v2(void*, int) { capturing = true; recorded = Graph(); return 0; }
int cuStreamEndCapture(void*, void** graph) { capturing = false; *graph = new Graph(recorded); return 0; }
int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) { *exec = new Graph(*(Graph*)graph); return 0; }
int cuGraphDestroy(void* graph) { delete (Graph*)graph; return 0; }
int cuGraphExecDestroy(void* graph) { delete (Graph*)graph; return 0; }
int cuGraphLaunch(void* graph, void*) {
    for (const Work& work : ((Graph*)graph)->works) submit(work);
    return broken;
}
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    *total = number("memory", "1073741824");
    *free = *total - used;
    return current ? 0 : 201;
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    if (!current) return 201;
    if (capturing) return 900;
    if (bytes > number("memory", "1073741824") - used) return 2;
    used += bytes;
    uint64_t* block = (uint64_t*)aligned_alloc(256, (bytes + 511) / 256 * 256);
    std::memset(block, 0xff, (bytes < 67108864 ? bytes : 67108864) + 256);  // of more, pages would only cost time
    block[0] = bytes;
    *address = (uint64_t)block + 256;
    return 0;
}
int cuMemFree_v2(uint64_t address) {
    if (!current) return 201;
    if (done != queue.size() && !broken) std::abort();  // freed under work that may use it
    used -= *(uint64_t*)(address - 256);
    std::free((void*)(address - 256));
    return 0;
}
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) { *memory = std::malloc(bytes); return current ? 0 : 201; }
int cuMemFreeHost(void* memory) { std::free(memory); return 0; }
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void*) {
    return submit([=] { std::memset((void*)at, value, bytes); });
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
    return submit([=] { std::memcpy((void*)to, from, bytes); });
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
    return submit([=] { std::memcpy(to, (void*)from, bytes); });
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
    return submit([=] { std::memcpy((void*)to, (void*)from, bytes); });
}
// What calls itself a cubin, and real ones, which are ELF.
int cuModuleLoadData(void** module, const void* image) {
    *module = (void*)image;
    bool code = !std::memcmp(image, "cubin", 5) || !std::memcmp(image, "\177ELF", 4);
    return !current ? 201 : capturing ? 900 : code ? 0 : 200;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    *function = strdup(name);
    return std::strstr(name, "missing") ? 500 : 0;
}
int cuFuncGetAttribute(int* value, int, void*) { *value = 16; return 0; }
int cuFuncSetAttribute(void*, int attribute, int value) { return attribute == 8 && value == 232448 - 16 ? 0 : 1; }
struct Attribute {
    int id;
    char pad[4];
    unsigned value[16];
};
struct Config {
    unsigned x, y, z, bx, by, bz, shared;
    void* stream;
    Attribute* attributes;
    unsigned count;
};
// What a map says, in its 128 bytes.
struct Map {
    uint64_t address, cols, rows, stride;
    uint32_t box[2], nothing[22];
};
static_assert(sizeof(Map) == 128, "as the driver's");
int cuTensorMapEncodeTiled(Map* map, int type, unsigned rank, void* address, const uint64_t* shape, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* steps, int interleave, int swizzle, int, int fill) {
    bool fits = (uint64_t)map % 64 == 0 && type == 9 && rank == 2 && steps[0] == 1 && steps[1] == 1 && !interleave && swizzle == 3 && !fill;
    if (!current || !fits || (uint64_t)address % 16 || strides[0] % 16) return 1;
    *map = Map{(uint64_t)address, shape[0], shape[1], strides[0], {box[0], box[1]}, {}};
    return 0;
}
int cuLaunchKernelEx(const Config* config, void* function, void** words, void**) {
    unsigned x = config->x;
    if (x * config->y * config->z == 0 || config->bx == 0 || config->shared > 232448 || config->count > 2) return 1;
    std::string name = (const char*)function;
    if (setting("fault", "") == name) return submit([] { broken = 700; });
    if (name == "copy_box") {
        // Read at once, all 128 bytes of each, as the driver does.
        Map to = *(Map*)words[0], from = *(Map*)words[1];
        const Attribute *cluster = config->attributes, *overlapping = cluster + 1;
        if (config->count != 2 || overlapping->id != 6 || overlapping->value[0] != 1) return 1;
        if (cluster->id != 4 || cluster->value[0] != 2 || cluster->value[1] != 1 || cluster->value[2] != 1) return 1;
        return submit([=] {
            for (unsigned r = 0; r < from.box[1] && r < from.rows && r < to.rows; r++) {
                uint64_t cols = from.cols < to.cols ? from.cols : to.cols;
                std::memcpy((char*)to.address + r * to.stride, (char*)from.address + r * from.stride, 2 * (cols < from.box[0] ? cols : from.box[0]));
            }
        });
    }
    if (name != "gather" || config->count != 0) return submit([] {});
    uint16_t *to = *(uint16_t**)words[0], *from = *(uint16_t**)words[1];
    uint32_t *rows = *(uint32_t**)words[2], stride = *(uint32_t*)words[3];
    return submit([=] {
        for (unsigned i = 0; i < x; i++) std::memcpy(to + i * stride, from + rows[i] * stride, 2 * stride);
    });
}
int cuEventCreate(void** event, unsigned) { *event = new Event{0}; return current ? 0 : 201; }
int cuEventDestroy_v2(void* event) { delete (Event*)event; return 0; }
int cuEventRecord(void* event, void*) { ((Event*)event)->position = queue.size(); return current ? broken : 201; }
int cuEventSynchronize(void* event) { return wait(((Event*)event)->position); }
// The plain name alone, as drivers before CUDA 12.8 have it.
int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
    *milliseconds = (float)(((Event*)to)->position - ((Event*)from)->position);
    return 0;
}
}

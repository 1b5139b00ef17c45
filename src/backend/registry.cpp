#include "backend/registry.hpp"

#include "backend/reference/reference.hpp"
#include "base/error.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <dlfcn.h>
#include <sys/stat.h>

namespace ponder {

namespace {

bool is_folder(const std::string &path) {
    struct stat info;
    return !path.empty() && stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

std::string folder_of_library() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<void *>(&load_backends), &info) || !info.dli_fname)
        return "";
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "" : path.substr(0, slash);
}

// Modules are named ponder-<backend>.so; the installed folder carries the module ABI's number.
std::vector<std::string> search_folders(const std::string &explicit_folder) {
    std::vector<std::string> folders{explicit_folder};
    if (const char *variable = secure_getenv("PONDER_BACKEND_PATH"))
        folders.push_back(variable);
    const std::string library = folder_of_library();
    if (!library.empty()) {
        folders.push_back(library + "/ponder-" + std::to_string(PONDER_BACKEND_ABI));
        folders.push_back(library + "/../../backends"); // <build>/src/api/libponder.so
    }
    folders.push_back(PONDER_BACKEND_DIR);
    return folders;
}

// Module files directly in the folder and one level below (the build tree has a folder each).
std::vector<std::string> module_files(const std::string &folder) {
    std::vector<std::string> files, subfolders;
    DIR *directory = opendir(folder.c_str());
    if (!directory)
        return files;
    while (const dirent *entry = readdir(directory)) {
        const std::string name = entry->d_name, path = folder + "/" + name;
        if (name.size() > 10 && name.starts_with("ponder-") && name.ends_with(".so"))
            files.push_back(path);
        else if (name[0] != '.' && name.find('.') == std::string::npos && is_folder(path))
            subfolders.push_back(path + "/ponder-" + name + ".so");
    }
    closedir(directory);
    for (const std::string &path : subfolders)
        if (struct stat info; stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode))
            files.push_back(path);
    std::sort(files.begin(), files.end());
    return files;
}

void probe(Backend &backend) {
    const ponder_backend *d = backend.descriptor;
    constexpr size_t host_part = offsetof(ponder_backend, copy);
    const size_t least = d->host_memory ? host_part : sizeof(ponder_backend);
    if (d->struct_size < least || d->abi != PONDER_BACKEND_ABI) {
        backend.reason = "module ABI " + std::to_string(d->abi) + " with a descriptor of " +
                         std::to_string(d->struct_size) + " bytes, this library needs " +
                         std::to_string(PONDER_BACKEND_ABI) + " and " + std::to_string(least);
        backend.descriptor = nullptr;
        return;
    }
    backend.name = d->name;
    char why[256] = "";
    if (!d->probe(why, sizeof why))
        backend.reason = why[0] ? why : "not usable here";
}

Backend load_module(const std::string &path) {
    Backend backend;
    backend.path = path;
    backend.name = path.substr(path.rfind('/') + 1);
    void *module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!module) {
        const char *text = dlerror();
        backend.reason = text ? text : "dlopen failed";
        return backend;
    }
    const auto query =
        reinterpret_cast<ponder_backend_query_fn>(dlsym(module, "ponder_backend_query_v1"));
    backend.descriptor = query ? query() : nullptr;
    if (backend.descriptor)
        probe(backend);
    else
        backend.reason = "exports no ponder_backend_query_v1";
    return backend;
}

int priority_of(const Backend &backend) {
    return backend.available() ? backend.descriptor->priority : -1;
}

} // namespace

std::vector<Backend> load_backends(const std::string &folder, const Log &log) {
    if (!folder.empty() && !is_folder(folder))
        throw_error(PONDER_E_NOT_FOUND, "backend_path '%s' is no folder", folder.c_str());
    std::vector<Backend> backends;
    backends.push_back({reference_backend(), "reference", "", ""});
    for (const std::string &place : search_folders(folder)) {
        if (!is_folder(place))
            continue;
        const std::vector<std::string> files = module_files(place);
        for (const std::string &path : files) {
            backends.push_back(load_module(path));
            if (log && !backends.back().available())
                log(PONDER_LOG_INFO, (path + ": " + backends.back().reason).c_str());
        }
        if (!files.empty())
            break;
    }
    std::stable_sort(backends.begin(), backends.end(), [](const Backend &a, const Backend &b) {
        return priority_of(a) > priority_of(b);
    });
    return backends;
}

Device::Device(const Backend &backend, std::shared_ptr<Memory> memory,
               std::shared_ptr<Threads> threads, Log log)
    : memory_(std::move(memory)), threads_(std::move(threads)), log_(std::move(log)),
      backend_(backend.descriptor) {
    host_.struct_size = sizeof host_;
    host_.workers = threads_->count();
    host_.user_data = this;
    host_.allocate = [](void *self, size_t size, size_t) -> void * {
        try {
            return static_cast<Device *>(self)->memory_->allocate(size);
        } catch (const Error &) {
            return nullptr;
        }
    };
    host_.release = [](void *self, void *block) {
        static_cast<Device *>(self)->memory_->release(block);
    };
    host_.log = [](void *self, int32_t level, const char *message) {
        if (const Log &log = static_cast<Device *>(self)->log_)
            log(level, message);
    };
    char why[256] = "";
    device_ = backend_->open(&host_, why, sizeof why);
    if (!device_)
        throw_error(PONDER_E_BACKEND, "backend '%s': %s", backend_->name, why);
    if (backend_->host_memory && backend_ != reference_backend()) {
        fallback_ = reference_backend()->open(&host_, why, sizeof why);
        if (!fallback_) {
            backend_->close(device_);
            throw_error(PONDER_E_BACKEND, "reference kernels: %s", why);
        }
    }
}

Device::~Device() {
    for (const auto &[constant, resident] : resident_)
        release(resident.block, resident.size);
    memory_->refund(packed_);
    if (fallback_)
        reference_backend()->close(fallback_);
    backend_->close(device_);
}

void Device::expect(int32_t result) const {
    if (result == 0)
        return;
    const char *text = backend_->problem(device_);
    throw_error(PONDER_E_BACKEND, "backend '%s': %s", backend_->name, text ? text : "failed");
}

void *Device::allocate(size_t size) const {
    if (on_host()) {
        void *block = memory_->allocate(size);
        std::memset(block, 0, size);
        return block;
    }
    std::lock_guard lock(mutex_);
    return allocate_locked(size);
}

void *Device::allocate_locked(size_t size) const {
    memory_->charge(size);
    void *block = backend_->allocate(device_, std::max<size_t>(size, 1));
    if (!block) {
        memory_->refund(size);
        throw_error(PONDER_E_NO_MEMORY, "backend '%s': no %zu bytes of device memory",
                    backend_->name, size);
    }
    if (backend_->clear(device_, block, size) != 0) {
        backend_->release(device_, block);
        memory_->refund(size);
        expect(1);
    }
    return block;
}

void Device::release(void *block, size_t size) const noexcept {
    if (!block)
        return;
    if (on_host())
        return memory_->release(block);
    std::lock_guard lock(mutex_);
    backend_->release(device_, block);
    memory_->refund(size);
}

void Device::move(Move call, void *to, const void *from, size_t size) const {
    if (size == 0)
        return;
    if (on_host()) {
        std::memmove(to, from, size);
        return;
    }
    std::lock_guard lock(mutex_);
    expect((backend_->*call)(device_, to, from, size));
}

void Device::upload(void *to, const void *from, size_t size) const {
    move(&ponder_backend::upload, to, from, size);
}

void Device::download(void *to, const void *from, size_t size) const {
    move(&ponder_backend::download, to, from, size);
}

template <class Call> void Device::in_group(Call call) const {
    char why[300] = "";
    std::lock_guard lock(mutex_);
    if (call(why, sizeof why) != 0)
        throw_error(PONDER_E_BACKEND, "%s: %s", backend_->name, why);
}

Device::GroupKey Device::group_key() const {
    GroupKey key{};
    in_group([&](char *why, size_t size) {
        return backend_->group_key(device_, key.data(), why, size);
    });
    return key;
}

void Device::group_join(const GroupKey &key, uint32_t rank, uint32_t count, double patience) const {
    in_group([&](char *why, size_t size) {
        return backend_->group_join(device_, key.data(), rank, count, patience, why, size);
    });
}

void Device::group_sum(float *values, size_t count, double patience) const {
    in_group([&](char *why, size_t size) {
        return backend_->group_sum(device_, values, count, patience, why, size);
    });
}

void Device::copy(void *to, const void *from, size_t size) const {
    move(&ponder_backend::copy, to, from, size);
}

void Device::clear(void *block, size_t size) const {
    if (size == 0)
        return;
    if (on_host()) {
        std::memset(block, 0, size);
        return;
    }
    std::lock_guard lock(mutex_);
    expect(backend_->clear(device_, block, size));
}

void Device::synchronize() const {
    if (on_host())
        return;
    std::lock_guard lock(mutex_);
    expect(backend_->synchronize(device_));
}

void *Device::resident(const void *constant, size_t size) const {
    if (on_host() || !constant)
        return const_cast<void *>(constant);
    std::lock_guard lock(mutex_);
    if (const auto at = resident_.find(constant); at != resident_.end())
        return at->second.block;
    void *block = allocate_locked(size);
    resident_[constant] = {block, size};
    expect(backend_->upload(device_, block, constant, size));
    return block;
}

Device::Mailbox::Mailbox(std::shared_ptr<const Device> device, size_t size)
    : device_(std::move(device)) {
    std::lock_guard lock(device_->mutex_);
    box_ = device_->backend_->mailbox(device_->device_, size);
    if (!box_)
        throw_error(PONDER_E_NO_MEMORY, "backend '%s': no %zu bytes of memory for downloads",
                    device_->backend_->name, size);
}

Device::Mailbox::~Mailbox() {
    if (!box_)
        return;
    std::lock_guard lock(device_->mutex_);
    device_->backend_->drop_mailbox(device_->device_, box_);
}

void Device::Mailbox::send(const void *from, size_t size) const {
    std::lock_guard lock(device_->mutex_);
    device_->expect(device_->backend_->send(device_->device_, box_, from, size));
}

void Device::Mailbox::receive(void *to, size_t size) const {
    std::lock_guard lock(device_->mutex_);
    device_->expect(device_->backend_->receive(device_->device_, box_, to, size));
}

void Device::refresh(const void *constant) const {
    if (!on_host()) {
        std::lock_guard lock(mutex_);
        if (const auto at = resident_.find(constant); at != resident_.end())
            expect(backend_->upload(device_, at->second.block, constant, at->second.size));
    }
    refresh_packed(constant);
}

void Device::refresh_packed(const void *constant) const {
    if (!backend_->refresh)
        return;
    std::unique_lock lock(mutex_, std::defer_lock);
    if (!on_host())
        lock.lock();
    backend_->refresh(device_, constant);
}

bool Device::can_forget() const {
    const bool knows = backend_->struct_size > offsetof(ponder_backend, forget);
    return !backend_->refresh || (knows && backend_->forget);
}

void Device::forget(const void *constant) const noexcept {
    std::unique_lock lock(mutex_, std::defer_lock);
    if (!on_host())
        lock.lock();
    if (backend_->refresh)
        backend_->forget(device_, constant);
    if (const size_t now = on_host() ? packed_ : backend_->packed_bytes(device_); now < packed_) {
        memory_->refund(packed_ - now);
        packed_ = now;
    }
    if (const auto at = resident_.find(constant); at != resident_.end()) {
        backend_->release(device_, at->second.block);
        memory_->refund(at->second.size);
        resident_.erase(at);
    }
}

DeviceBuffer::DeviceBuffer(std::shared_ptr<const Device> device, size_t size)
    : device_(std::move(device)), data_(device_->allocate(size)), size_(size) {}

// Copies of weights that the module made while planning count too.
void Device::count_packed() const {
    const size_t now = backend_->packed_bytes(device_);
    if (now <= packed_)
        return;
    memory_->charge(now - packed_);
    packed_ = now;
}

Device::Kernel Device::plan(const ponder_op_call &call, bool required) const {
    char why[256] = "";
    std::unique_lock lock(mutex_, std::defer_lock);
    if (!on_host())
        lock.lock();
    const auto ask = [&](const ponder_backend *backend, ponder_device *device) {
        Kernel kernel(backend);
        const int32_t result = backend->plan(device, &call, &kernel.plan, why, sizeof why);
        if (result != PONDER_PLAN_OK)
            kernel.owner = nullptr;
        if (result == PONDER_PLAN_NO_MEMORY)
            throw_error(PONDER_E_NO_MEMORY, "backend '%s', op '%s': %s", backend->name, call.op,
                        why);
        if (result == PONDER_PLAN_FAILED)
            throw_error(PONDER_E_BACKEND, "backend '%s', op '%s': %s", backend->name, call.op, why);
        return kernel;
    };
    Kernel kernel = ask(backend_, device_);
    if (!on_host())
        count_packed();
    if (!kernel.owner && fallback_)
        kernel = ask(reference_backend(), fallback_);
    if (!kernel.owner && required)
        throw_error(PONDER_E_BACKEND, "backend '%s' has no kernel for op '%s' version %u",
                    backend_->name, call.op, call.version);
    return kernel;
}

} // namespace ponder

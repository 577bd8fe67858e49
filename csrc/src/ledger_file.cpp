// SPDX-License-Identifier: Apache-2.0
#include "ledger_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

namespace kvc::ledger {
namespace {

constexpr int kOpenAttempts = 16;

Status fail(Code code, std::string what, int error = 0) {
  return Status::error(code, std::move(what), error);
}

std::string directory_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// Closes a descriptor that carries no locks.
struct PlainFd {
  int fd = -1;
  ~PlainFd() {
    if (fd >= 0) ::close(fd);
  }
};

// Only its owner may enter the directory: who can rename in it could swap the ledger for another.
Status open_directory(const std::string& path, bool create, PlainFd& out) {
  if (create && mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return fail(Code::driver, describe_errno("ledger: cannot make the directory " + path, errno),
                errno);
  }
  out.fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (out.fd < 0) {
    const int error = errno;
    const char* remedy = error == ELOOP || error == ENOTDIR
                             ? "; it must be a real directory and no symbolic link"
                             : "";
    return fail(Code::driver,
                describe_errno("ledger: cannot open the directory " + path, error) + remedy, error);
  }
  struct stat info = {};
  if (fstat(out.fd, &info) != 0) return fail(Code::driver, describe_errno(path, errno), errno);
  if (info.st_uid != geteuid()) {
    return fail(Code::driver, "ledger: the directory " + path + " belongs to user " +
                                  std::to_string(info.st_uid) + ", not to " +
                                  std::to_string(geteuid()) + "; use a directory of your own");
  }
  if ((info.st_mode & 077) != 0) {
    return fail(Code::driver, "ledger: others may enter the directory " + path +
                                  "; run chmod 700 on it, or use a directory of its own");
  }
  return {};
}

bool same_file(const struct stat& a, const struct stat& b) {
  return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

}  // namespace

std::string describe_errno(const std::string& what, int error) {
  return what + ": " + std::strerror(error);
}

Status LedgerFile::open(const std::string& path, std::optional<uint64_t> capacity,
                        std::optional<uint64_t> headroom, std::shared_ptr<LedgerFile>& out) {
  if (name_of(path).empty() || path.find('\0') != std::string::npos) {
    return fail(Code::invalid_argument, "ledger: the path must name a file");
  }
  if (capacity && (*capacity == 0 || *capacity > kMaxBytes)) {
    return fail(Code::invalid_argument,
                "ledger: the capacity must be 1 to 2^56 bytes, not " + std::to_string(*capacity));
  }
  if (headroom && *headroom > capacity.value_or(kMaxBytes)) {
    return fail(Code::invalid_argument, "ledger: the headroom of " + std::to_string(*headroom) +
                                            " bytes exceeds the capacity");
  }
  std::error_code error;
  const std::string absolute = std::filesystem::absolute(path, error);
  if (error) return fail(Code::driver, describe_errno(path, error.value()), error.value());
  std::shared_ptr<LedgerFile> file(new LedgerFile(absolute, capacity, headroom));
  Section section;
  // A file that is deleted between opening and locking is nobody's ledger: open the path again.
  for (int attempt = 0; attempt < kOpenAttempts; ++attempt) {
    if (Status status = file->open_inode(); !status.ok()) return status;
    if (Status status = section.enter_unchecked(*file); !status.ok()) return status;
    if (file->still_at_path().ok()) {
      Status status = file->map_and_check();
      section.leave();
      if (status.ok()) out = std::move(file);
      return status;
    }
    section.leave();
  }
  return fail(Code::lost, "ledger " + path + " is deleted again and again; find out by whom");
}

// Whoever opens or joins looks, inside the critical section, whether the file still has its name.
// So one that is deleted inside it, without a member, never gets one.
Status LedgerFile::remove(const std::string& path) {
  std::error_code error;
  const std::string absolute = std::filesystem::absolute(path, error);
  if (error) return fail(Code::driver, describe_errno(path, error.value()), error.value());
  LedgerFile file(absolute, std::nullopt, std::nullopt);
  if (Status status = file.open_inode(); !status.ok()) {
    return status.driver_code == ENOENT ? Status{} : status;
  }
  Section section;
  if (Status status = section.enter_unchecked(file); !status.ok()) return status;
  if (!file.still_at_path().ok()) return {};  // somebody else was faster
  if (file.fd_.held_elsewhere(kMemberBytes, kMemberBytesLength)) {
    return fail(Code::refused, "ledger " + path + " has living members: stop them first");
  }
  if (unlink(absolute.c_str()) != 0) {
    return fail(Code::driver, describe_errno("ledger: cannot delete " + path, errno), errno);
  }
  return {};
}

LedgerFile::~LedgerFile() {
  if (file_ != nullptr) munmap(static_cast<void*>(file_), sizeof(File));
}

Status LedgerFile::open_inode() {
  PlainFd directory;
  const bool create = capacity_.has_value();
  if (Status status = open_directory(directory_of(path_), create, directory); !status.ok()) {
    return status;
  }
  const int flags = O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | (create ? O_CREAT : 0);
  if (const int error = fd_.open(directory.fd, name_of(path_).c_str(), flags, 0600); error != 0) {
    std::string what = describe_errno("ledger: cannot open " + path_, error);
    if (error == ENOENT) what += "; start an engine first, or name a capacity to create it";
    if (error == ELOOP) what += "; it is a symbolic link, remove it";
    return fail(Code::driver, std::move(what), error);
  }
  return check_inode();
}

Status LedgerFile::check_inode() const {
  struct stat info = {};
  if (fstat(fd_.get(), &info) != 0) return fail(Code::driver, describe_errno(path_, errno), errno);
  if (!S_ISREG(info.st_mode)) {
    return fail(Code::driver, "ledger: " + path_ + " is not a regular file; remove it");
  }
  if (info.st_uid != geteuid()) {
    return fail(Code::driver, "ledger: " + path_ + " belongs to user " +
                                  std::to_string(info.st_uid) + ", not to " +
                                  std::to_string(geteuid()) +
                                  "; run all engines of a device as one user");
  }
  if ((info.st_mode & 077) != 0) {
    return fail(Code::driver, "ledger: others may use " + path_ + "; run chmod 600 on it");
  }
  if (info.st_nlink > 1) {
    return fail(Code::driver, "ledger: " + path_ + " has more than one name; remove it");
  }
  return {};
}

Status LedgerFile::still_at_path() const {
  if (fd_.get() < 0) return lost_in_fork();
  struct stat ours = {};
  struct stat named = {};
  if (fstat(fd_.get(), &ours) == 0 &&
      fstatat(AT_FDCWD, path_.c_str(), &named, AT_SYMLINK_NOFOLLOW) == 0 &&
      same_file(ours, named)) {
    return {};
  }
  return fail(Code::lost, "ledger " + path_ +
                              " was deleted or replaced while in use, so engines started since do "
                              "not share it; restart every engine of this device");
}

Status LedgerFile::lost_in_fork() const {
  return fail(Code::lost, "ledger " + path_ +
                              " was opened before fork; open it again in this process and attach "
                              "to the member");
}

Status LedgerFile::map_and_check() {
  struct stat info = {};
  if (fstat(fd_.get(), &info) != 0) return fail(Code::driver, describe_errno(path_, errno), errno);
  alignas(Header) std::array<unsigned char, sizeof(Header)> bytes = {};
  const ssize_t got = pread(fd_.get(), bytes.data(), bytes.size(), 0);
  if (got < 0) return fail(Code::driver, describe_errno("ledger " + path_, errno), errno);

  const bool in_use = fd_.held_elsewhere(kMemberBytes, kMemberBytesLength);
  const bool blank = std::all_of(bytes.begin(), bytes.end(), [](auto byte) { return byte == 0; });
  const auto& header = *reinterpret_cast<const Header*>(bytes.data());
  if (blank) {  // new, or its creator died before it wrote a word
    if (!in_use) return build_file(info.st_size);
    return fail(Code::lost,
                "ledger " + path_ + " was emptied while in use; stop its members and delete it");
  }
  if (got < static_cast<ssize_t>(offsetof(Header, capacity)) || header.magic.load() != kMagic) {
    return fail(Code::lost, path_ + " is not a ledger; delete it, or use another path");
  }
  if (const uint32_t version = header.version.load();
      version != kVersion || header.layout != kLayout) {
    if (!in_use && capacity_) return build_file(info.st_size);
    return fail(Code::not_supported,
                "ledger " + path_ + " has format " + std::to_string(version) + "." +
                    std::to_string(header.layout) + ", this release needs " +
                    std::to_string(kVersion) + "." + std::to_string(kLayout) +
                    (in_use ? "; its members are alive: stop them, or use one release for all"
                            : "; start an engine of this release to rebuild it"));
  }
  if (info.st_size < static_cast<off_t>(sizeof(File)) || header.file_bytes != sizeof(File)) {
    return fail(Code::lost, "ledger " + path_ + " has " + std::to_string(info.st_size) +
                                " bytes instead of " + std::to_string(sizeof(File)) +
                                "; it is damaged. Stop its members and delete it");
  }
  if (Status status = map(info.st_size); !status.ok()) return status;
  return adopt(in_use);
}

Status LedgerFile::build_file(int64_t size) {
  if (!capacity_) {
    return fail(Code::lost,
                "ledger " + path_ + " is unfinished; start an engine first, or name a capacity");
  }
  if (Status status = map(size); !status.ok()) return status;
  build(*file_, *capacity_, headroom_.value_or(0));
  created_ns_ = header().created_ns;
  return {};
}

// Takes the storage up front: a store to a page that the file system cannot provide would be a
// SIGBUS. Never makes the file smaller, since others may have it mapped.
Status LedgerFile::map(int64_t size) {
  const auto bytes = static_cast<off_t>(sizeof(File));
  int error = fallocate(fd_.get(), 0, 0, bytes) == 0 ? 0 : errno;
  if (error == EOPNOTSUPP && size < bytes) error = ftruncate(fd_.get(), bytes) == 0 ? 0 : errno;
  if (error == EOPNOTSUPP) error = 0;
  if (error != 0) {
    return fail(Code::driver,
                describe_errno("ledger: no room for " + path_, error) +
                    "; free space on its file system, or use another directory",
                error);
  }
  void* mapped = mmap(nullptr, sizeof(File), PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (mapped == MAP_FAILED) {
    return fail(Code::driver, describe_errno("ledger: cannot map " + path_, errno), errno);
  }
  file_ = static_cast<File*>(mapped);
  return {};
}

// Checks a file of our own version, and sets it to our numbers if no member depends on the old.
Status LedgerFile::adopt(bool in_use) {
  Header& header = file_->header;
  const uint64_t capacity = header.capacity.load();
  const uint64_t headroom = header.headroom.load();
  const bool sane = capacity >= 1 && capacity <= kMaxBytes && headroom <= capacity &&
                    header.external.load() <= kMaxBytes;
  if (!sane && (in_use || !capacity_)) {
    return fail(Code::lost, "ledger " + path_ +
                                " has an impossible capacity, headroom or external use; it is "
                                "damaged. Stop its members and delete it");
  }
  if (!sane) {
    build(*file_, *capacity_, headroom_.value_or(0));
  } else if (in_use) {
    if (Status status = still_as_wanted(); !status.ok()) return status;
  } else {
    const bool reset = !still_as_wanted().ok();
    const uint64_t wanted = capacity_.value_or(capacity);
    for (int index = 0; index < kSlots; ++index) {
      Slot& slot = file_->slots[index];
      if (reset || !check_slot(slot, index, wanted).ok()) slot.generation.store(0);
    }
    if (reset) {
      header.external.store(0);
      header.capacity.store(wanted);
      header.headroom.store(std::min(headroom_.value_or(headroom), wanted));
    }
  }
  created_ns_ = header.created_ns;
  return {};
}

Status LedgerFile::still_as_wanted() const {
  const struct {
    const char* name;
    const Word& now;
    const std::optional<uint64_t>& wanted;
  } numbers[] = {{"capacity", header().capacity, capacity_},
                 {"headroom", header().headroom, headroom_}};
  for (const auto& number : numbers) {
    const uint64_t now = number.now.load();
    if (!number.wanted || *number.wanted == now) continue;
    return fail(Code::invalid_argument,
                "ledger " + path_ + " is in use with a " + number.name + " of " +
                    std::to_string(now) + " bytes, not " + std::to_string(*number.wanted) +
                    "; give every engine of the device the same number, or stop the others first");
  }
  return {};
}

}  // namespace kvc::ledger

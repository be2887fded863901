#include "llvm_jit.h"
#include <fmt/format.h>
#include <llvm/AsmParser/Parser.h>
#include <llvm/Config/llvm-config.h>
#include <llvm/ExecutionEngine/Orc/JITTargetMachineBuilder.h>
#include <llvm/ExecutionEngine/Orc/LLJIT.h>
#include <llvm/IR/LegacyPassManager.h>
#include <llvm/IR/Module.h>
#include <llvm/IR/Verifier.h>
#include <llvm/Object/ObjectFile.h>
#include <llvm/Support/MemoryBuffer.h>
#include <llvm/Support/SourceMgr.h>
#include <llvm/Support/TargetSelect.h>
#include <llvm/Target/TargetMachine.h>

namespace kda::host {
namespace {

std::string message_of(llvm::Error error) {
  return llvm::toString(std::move(error));
}

/// Default code generation for this CPU. The emitter writes what it means, so no IR optimiser runs: it costs
/// three times the code generation and gains nothing.
llvm::Expected<llvm::orc::JITTargetMachineBuilder> machine_builder() {
  static const bool ready = !llvm::InitializeNativeTarget() && !llvm::InitializeNativeTargetAsmPrinter();
  if (!ready) return llvm::createStringError("LLVM has no code generator for this machine");
  auto builder = llvm::orc::JITTargetMachineBuilder::detectHost();
  if (!builder) return builder;
  builder->setCodeGenOptLevel(llvm::CodeGenOptLevel::Default);
  builder->setRelocationModel(llvm::Reloc::PIC_); // what the linker of LLJIT expects
  builder->setCodeModel(llvm::CodeModel::Small);
  return builder;
}

int vector_bytes(const llvm::SubtargetFeatures& features) {
  int bytes = 16;
  for (const std::string& feature : features.getFeatures()) {
    if (feature == "+avx512f") return 64;
    if (feature == "+avx2") bytes = 32;
  }
  return bytes;
}

class OrcObject : public LoadedObject {
public:
  explicit OrcObject(std::unique_ptr<llvm::orc::LLJIT> jit) : jit_(std::move(jit)) {}

  llvm::Error find(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      auto address = jit_->lookup(name);
      if (!address) return address.takeError();
      entries.push_back(address->toPtr<void*>());
    }
    return llvm::Error::success();
  }

private:
  std::unique_ptr<llvm::orc::LLJIT> jit_;
};

} // namespace

Result<Target> detect_target() {
  auto builder = machine_builder();
  if (!builder)
    return fail(ErrorCode::unavailable, "LLVM does not know this CPU", message_of(builder.takeError()));
  Target t;
  t.kind = Target::Kind::host;
  t.arch = builder->getCPU();
  t.features = builder->getFeatures().getString();
  t.vector_bytes = vector_bytes(builder->getFeatures());
  t.registers_per_sm = 0;
  return t;
}

std::string compiler_version() {
  return "llvm " LLVM_VERSION_STRING;
}

Result<std::string> compile_object(const SourceUnit& unit) {
  const auto refuse = [&](std::string why) {
    return fail(ErrorCode::compile_failed, fmt::format("LLVM refused {}; report this as a bug", unit.name),
                std::move(why));
  };
  auto builder = machine_builder();
  if (!builder) return refuse(message_of(builder.takeError()));
  auto machine = builder->createTargetMachine();
  if (!machine) return refuse(message_of(machine.takeError()));

  llvm::LLVMContext context;
  llvm::SMDiagnostic diagnostic;
  const auto module = llvm::parseAssembly(llvm::MemoryBufferRef(unit.main, unit.name), diagnostic, context);
  std::string text;
  llvm::raw_string_ostream stream(text);
  if (!module) {
    diagnostic.print(unit.name.c_str(), stream, false);
    return refuse(stream.str());
  }
  module->setTargetTriple((*machine)->getTargetTriple().str());
  module->setDataLayout((*machine)->createDataLayout());
  if (llvm::verifyModule(*module, &stream)) return refuse(stream.str());

  llvm::SmallVector<char, 0> object;
  llvm::raw_svector_ostream out(object);
  llvm::legacy::PassManager passes;
  if ((*machine)->addPassesToEmitFile(passes, out, nullptr, llvm::CodeGenFileType::ObjectFile))
    return refuse("this machine has no object format");
  passes.run(*module);
  return std::string(object.begin(), object.end());
}

Result<std::unique_ptr<LoadedObject>> load_object(const SourceUnit& unit, const std::string& bytes) {
  const auto refuse = [&](llvm::Error error) {
    return fail(ErrorCode::load_failed, fmt::format("the object of {} cannot be loaded", unit.name),
                message_of(std::move(error)));
  };
  auto buffer = llvm::MemoryBuffer::getMemBufferCopy(bytes, unit.name);
  // Before ORC sees it: what is no object at all is refused here.
  if (auto parsed = llvm::object::ObjectFile::createObjectFile(buffer->getMemBufferRef()); !parsed)
    return refuse(parsed.takeError());
  auto builder = machine_builder();
  if (!builder) return refuse(builder.takeError());
  auto jit = llvm::orc::LLJITBuilder().setJITTargetMachineBuilder(std::move(*builder)).create();
  if (!jit) return refuse(jit.takeError());
  // The error of a lookup says it all; without this ORC prints to stderr as well.
  (*jit)->getExecutionSession().setErrorReporter(
      [](llvm::Error error) { llvm::consumeError(std::move(error)); });
  if (auto error = (*jit)->addObjectFile(std::move(buffer))) return refuse(std::move(error));
  auto object = std::make_unique<OrcObject>(std::move(*jit));
  if (auto error = object->find(unit.entries)) return refuse(std::move(error));
  return object;
}

} // namespace kda::host

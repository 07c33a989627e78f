"""What Triton looks up of a backend, and its interpreter never calls."""

from triton.backends.compiler import BaseBackend


class NoCompiler(BaseBackend):
    """Supports the CPU in name."""

    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreted"

    def get_module_map(self):
        return {}

    def load_dialects(self, context):
        pass

    def _never(self, *args, **options):
        raise NotImplementedError("kernels are interpreted; set TRITON_INTERPRET=1")

    parse_options = add_stages = pack_metadata = get_codegen_implementation = _never

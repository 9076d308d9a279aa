"""How the native libraries are built: `library` compiles and archives, `cuda` finds the toolkit, `backend` is what pip
calls. No network, no shell, nothing but the standard library and setuptools."""

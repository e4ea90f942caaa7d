"""Real models on real data, each trained with torch's loss and with torchce's: ``python -m examples``."""

import os

# Before torch is imported, for its threads read it then: those that wait for each other sleep instead of spinning. On a
# machine with other work (two cores, nine busy processes) glyphs then takes a fifth of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

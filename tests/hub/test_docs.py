"""What the documentation says of the Hub, run against one."""

import re
from pathlib import Path


PAGE = Path(__file__).parent.parent.parent / "docs" / "how-to" / "hub.md"

BEFORE = """
from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=4)).eval()
model.exit_config = ExitConfig(thresholds=[0.9, 0.9])
"""

AFTER = """
from PIL import Image
print(answer.exit_index.tolist(), classify(Image.new("RGB", (32, 32)), return_exit=True)[0]["exit"])
"""


def test_the_page_on_the_hub(hub):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.fullmatch(r"\[\d\] \d", hub.run(BEFORE + code + AFTER).stdout.strip())
    assert set(hub.files("alice/scan-resnet")) >= {"exit_config.json", "exit_config_fast.json", "model.safetensors"}
    assert "modeling_scan.py" in hub.files("alice/scan-resnet-code")

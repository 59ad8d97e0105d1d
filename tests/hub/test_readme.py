"""What the README says of the Hub, run against one."""

import re
from pathlib import Path


README = Path(__file__).parent.parent.parent / "README.md"

BEFORE = """
from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=4)).eval()
model.exit_config = ExitConfig(thresholds=[0.9, 0.9])
"""

AFTER = """
from PIL import Image
print(answer.exit_index.tolist(), classify(Image.new("RGB", (32, 32)), return_exit=True)[0]["exit"])
"""


def test_the_section_on_the_hub(hub):
    section = README.read_text(encoding="utf-8").split("## On the Hub")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert re.fullmatch(r"\[\d\] \d", hub.run(BEFORE + code + AFTER).stdout.strip())
    assert set(hub.files("alice/scan-resnet")) >= {"exit_config.json", "exit_config_fast.json", "model.safetensors"}
    assert "modeling_scan.py" in hub.files("alice/scan-resnet-code")

import pytest

from hf_scan.model.image_processing_scan import create_image_processor


def test_no_image_processor_for_other_channels():
    with pytest.raises(ValueError, match="takes 1 channels; an image processor is only made for 3"):
        create_image_processor(random_scan_model_with_one_channel())


def random_scan_model_with_one_channel():
    from hf_scan import ScanConfig, ScanForImageClassification

    return ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=3, num_channels=1))

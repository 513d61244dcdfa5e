"""From a DICOM image to a picture that every viewer shows, and a map in logits for some.

pip install 'diffsal[dicom]'
python examples/dicom_out.py image.dcm weights.pt FOLDER

Writes a colour Secondary Capture with the figure of `diffsal explain`, and a Parametric Map of the
difference, float32 at the image's size, in logits per cell of the layer's grid. Both belong to the
source's study and refer to it. Neither is for diagnosis.
"""

import copy
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import torch
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import diffsal
from diffsal.data.forms import as_pixels

MADE_BY = {
    "manufacturer": "diffsal",
    "manufacturer_model_name": "DifferenceCAM",
    "software_versions": diffsal.__version__,
    "device_serial_number": "0",
}


def secondary_capture(source: Dataset, pixels: np.ndarray) -> SCImage:
    """The figure (H, W, 3) uint8."""
    capture = SCImage.from_ref_dataset(
        source,
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=source.get("PatientOrientation", ("L", "F")),
        series_instance_uid=generate_uid(),
        series_number=9001,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        manufacturer=MADE_BY["manufacturer"],
    )
    capture.SeriesDescription = "diffsal: evidence for a decision. Not for diagnosis"
    refers = Dataset()
    refers.ReferencedSOPClassUID = source.SOPClassUID
    refers.ReferencedSOPInstanceUID = source.SOPInstanceUID
    capture.SourceImageSequence = [refers]
    return capture


def parametric_map(source: Dataset, difference: np.ndarray) -> ParametricMap:
    """The difference (H, W) float32 at the image's size, NaN where the model saw nothing."""
    low, high = float(np.nanmin(difference)), float(np.nanmax(difference))
    logits = RealWorldValueMapping(
        lut_label="LOGITS",
        lut_explanation="difference of two classes' maps, logits per cell",
        unit=CodedConcept("{logit}", "UCUM", "logits per cell"),
        value_range=(low, high),
        slope=1.0,
        intercept=0.0,
    )
    return ParametricMap(
        source_images=[_in_space(source)],
        pixel_array=difference[None].astype(np.float32),
        series_instance_uid=generate_uid(),
        series_number=9002,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[logits],
        voi_lut_transformations=[
            highdicom.VOILUTTransformation((low + high) / 2, max(high - low, 1e-6))
        ],
        content_label="DIFFERENCE",
        content_description="Evidence for a decision, in logits per cell",
        **MADE_BY,
    )


def _in_space(source: Dataset) -> Dataset:
    """The source or, where it is a projection without a place in space, a copy in its own plane."""
    if "FrameOfReferenceUID" in source:
        return source
    placed = copy.deepcopy(source)
    placed.FrameOfReferenceUID = generate_uid()
    placed.PositionReferenceIndicator = ""
    placed.ImagePositionPatient = [0.0, 0.0, 0.0]
    placed.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    placed.PixelSpacing = source.get("PixelSpacing") or source.get("ImagerPixelSpacing") or [1, 1]
    placed.SliceThickness = 1.0
    return placed


def main(arguments: Sequence[str]) -> None:
    """Explain one DICOM image and write both objects."""
    path, weights, folder = map(Path, arguments)
    source = pydicom.dcmread(path)
    loaded = diffsal.load_model(weights)
    with diffsal.DifferenceCAM(loaded.model, preprocessing=loaded.preprocessing) as cam:
        maps = cam.maps(path)
    assert loaded.preprocessing is not None
    size = as_pixels(path).shape[:2]
    placed = loaded.preprocessing.place(maps.difference[0], (size[0], size[1]))
    file = io.BytesIO()
    figure = maps.figure(path, classes=loaded.classes, preprocessing=loaded.preprocessing)
    figure.savefig(file, format="png")
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    secondary_capture(source, pixels).save_as(folder / "figure.dcm")
    parametric_map(source, placed.numpy()).save_as(folder / "difference.dcm")
    print(f"{folder}: figure.dcm, difference.dcm (highdicom {highdicom.__version__})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])

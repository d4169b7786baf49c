import numpy as np
import onnx

import qgraph.ir


def test_a_spelled_out_default_data_location_does_not_lose_the_weight(tmp_path):
    weight = np.arange(1000, dtype=np.float32)
    tensor = onnx.numpy_helper.from_array(weight, "w")
    tensor.data_location = onnx.TensorProto.DEFAULT  # as onnxruntime.quantization writes it
    assert tensor.HasField("data_location")
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1000])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [tensor])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")

    model = qgraph.ir.load(tmp_path / "m.onnx")
    qgraph.ir.save(model, tmp_path / "again.onnx")

    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weight)
    saved = onnx.load(tmp_path / "again.onnx").graph.initializer[0]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(saved), weight)

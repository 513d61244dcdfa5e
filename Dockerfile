FROM python:3.12-slim
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /diffsal
RUN pip install --no-cache-dir /diffsal
WORKDIR /data
ENTRYPOINT ["diffsal"]

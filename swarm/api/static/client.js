// Asks the server of this page: models, and answers as streams of events.

export class Problem extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const headers = (key) => (key ? { authorization: `Bearer ${key}` } : {});

async function refused(response) {
  let message = `the server answered ${response.status}`, code = null;
  try {
    ({ message, code } = (await response.json()).error);
  } catch { /* not JSON: somebody between us and the server spoke */ }
  const wait = response.headers.get('retry-after');
  if (wait && (response.status === 429 || response.status === 503)) message += ` (in ${wait} s)`;
  return new Problem(message, response.status, code);
}

async function reach(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Problem('the server of this page cannot be reached', 0, 'unreachable');
  }
  if (!response.ok) throw await refused(response);
  return response;
}

export async function models(key) {
  const response = await reach('v1/models', { headers: headers(key) });
  return (await response.json()).data;
}

// Yields the chunks of a chat completion. Raises Problem; AbortError when `signal` says so.
export async function* chat(body, key, signal) {
  const response = await reach('v1/chat/completions', {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, include_route: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === '[DONE]') return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Problem(chunk.error.message, 500, chunk.error.code);
    yield chunk;
  }
  throw new Problem('the answer broke off', 0, 'broken');
}

// The data of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '', data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith('data: ')) data.push(line.slice(6));
        else if (line === '' && data.length) {
          yield data.join('\n');
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Problem('the connection to the server of this page broke', 0, 'broken');
  } finally {
    reader.cancel().catch(() => {});
  }
}

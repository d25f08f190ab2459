// Send requests to the server. Answers are streams of JSON values, one per line.

const path = (name) => new URL(`../api/${name}`, import.meta.url);

export async function about() {
  const answer = await fetch(path("about"));
  if (!answer.ok) throw new Error(await said(answer));
  return answer.json();
}

// Call `hear` for each value of the answer; resolve at its end. Throws Error with a message for the user, and
// AbortError if `signal` was aborted.
export async function ask(what, fields, hear, signal) {
  let answer;
  try {
    answer = await fetch(path(what), {
      method: "POST", body: JSON.stringify(fields), signal,
      // jupyter-server-proxy passes on no other answer before its end.
      headers: { "content-type": "application/json", accept: "text/event-stream" },
    });
  } catch (e) {
    throw e.name === "AbortError" ? e : new Error("the server does not answer");
  }
  if (!answer.ok) throw new Error(await said(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line) continue;
      const event = JSON.parse(line);
      if (event.error !== undefined) throw new Error(event.error);
      hear(event);
    }
  }
}

async function said(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return `the server answered with status ${answer.status}`;
  }
}
